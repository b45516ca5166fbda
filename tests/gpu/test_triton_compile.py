"""Tiles of the Triton kernels, compiled: nothing spills, all fits; see every_architecture.py."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from triton_compile import ARCHITECTURES, check

PAIRS = [("bottleneck", arch) for arch in ARCHITECTURES]
PAIRS += [("dropout_in_front", "sm_80"), ("sequence_fusion", "sm_90")]


@pytest.mark.parametrize(("op", "arch"), PAIRS)
def test_tiles_fit(op: str, arch: str) -> None:
    check(op, arch)

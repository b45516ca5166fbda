"""Tiles of the Triton kernels, compiled: nothing spills, all fits; see every_architecture.py."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from triton_compile import check

# One of each kind of matrix core that is in use; a minute each.
PAIRS = [("bottleneck", arch) for arch in ("sm_80", "sm_90", "gfx942")]
PAIRS += [("dropout_in_front", "sm_80"), ("sequence_fusion", "sm_90")]


@pytest.mark.parametrize(("op", "arch"), PAIRS)
def test_tiles_fit(op: str, arch: str) -> None:
    check(op, arch)

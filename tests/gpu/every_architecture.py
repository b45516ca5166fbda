"""What test_triton_compile.py leaves out, minutes of it: pytest tests/gpu/every_architecture.py"""

from __future__ import annotations

import itertools

import pytest
from test_triton_compile import PAIRS
from triton_compile import ARCHITECTURES, check
from triton_steps import OPS

OTHERS = [pair for pair in itertools.product(OPS, ARCHITECTURES) if pair not in PAIRS]


@pytest.mark.parametrize(("op", "arch"), OTHERS)
def test_tiles_fit(op: str, arch: str) -> None:
    check(op, arch)

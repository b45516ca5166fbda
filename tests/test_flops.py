"""FlopCounterMode counts of the ops what it counts of the published modules, product by product."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from bottleneck_cases import Case, inputs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastadapters
from fastadapters import backends
from fastadapters.functional import BottleneckParameters, bottleneck, multiway_bottleneck

pytestmark = pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason="needs the compiled library"
)
NAMES = ("x", "down_weight", "up_weight", "norm_weight", "scale")


def flops(backend: str, needs: tuple[str, ...], split: int | None) -> dict[str, int]:
    """FLOPs of a forward and of its backward, by op."""
    case = Case(norm="both", scale="channel", residual="none", rows=(3, 7), d=12, r=5)
    tensors = inputs(case)
    x, cotangent = tensors.pop("x"), tensors.pop("cotangent")
    x.requires_grad_("x" in needs)
    sides = []
    for _ in range(2):
        leaves = {n: t.detach().clone().requires_grad_(n in needs) for n, t in tensors.items()}
        sides.append(BottleneckParameters(**leaves))
    leaves = [t for t in (x, *sides[0], *(sides[1] if split else ())) if isinstance(t, Tensor)]
    wanted = [t for t in leaves if t.requires_grad]
    counter = FlopCounterMode(display=False)
    with counter, fastadapters.backend(backend):
        if split is None:
            y = bottleneck(x, **sides[0]._asdict())
        else:
            y = multiway_bottleneck(x, split, *sides)
        if wanted:
            torch.autograd.grad(y, wanted, cotangent)
    return {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("split", [None, 3])
@pytest.mark.parametrize(
    "needs", [c for n in range(len(NAMES) + 1) for c in itertools.combinations(NAMES, n)], ids=str
)
def test_as_many_as_plain_pytorch(needs: tuple[str, ...], split: int | None) -> None:
    counted = flops("cpu", needs, split)
    kind = "bottleneck" if split is None else "multiway"
    assert counted.keys() <= {f"fastadapters.{kind}_{way}" for way in ("forward", "backward")}
    expected = sum(flops("reference", needs, split).values())
    if "scale" in needs and not {"x", "down_weight", "norm_weight"}.intersection(needs):
        expected += 2 * 21 * 12 * 5  # dy Wu, where plain PyTorch has kept h Wu^T
    assert sum(counted.values()) == expected > 0


def test_out_forms_and_recomputation() -> None:
    x, wd, wu, y = torch.randn(6, 8), torch.randn(3, 8), torch.randn(8, 3), torch.randn(6, 8)
    product = 2 * 6 * 8 * 3
    options = (*[None] * 4, 1.0, 1e-5, 0.0, 0.0, 1, 0, 0, False)
    z, ops = torch.randn(6, 3), torch.ops.fastadapters
    with FlopCounterMode(display=False) as counter:
        ops.bottleneck_forward_out(y, z, None, x, None, wd, None, wu, None, *options)
    assert counter.get_total_flops() == 2 * product
    dx, dw = torch.empty_like(x), torch.empty_like(wd)
    with FlopCounterMode(display=False) as counter:
        gradients = (dx, dw, *[None] * 6)
        ops.bottleneck_backward_out(*gradients, y, x, z, None, wd, None, wu, None, *options)
    assert counter.get_total_flops() == 3 * product
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        meta = [t.to("meta") for t in (y, x, torch.empty(0), torch.empty(0), wd)]
        ops.bottleneck_backward(*meta, None, wu.to("meta"), None, *options, 0b11)
    assert counter.get_total_flops() == 4 * product


@pytest.mark.parametrize("first", ["fastadapters", "torch.utils.flop_counter"])
def test_either_is_imported_first(first: str) -> None:
    code = f"""
import {first}, fastadapters, torch
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    fastadapters.BottleneckAdapter(8, 4)(torch.randn(3, 8))
assert counter.get_total_flops() == 4 * 3 * 8 * 4, counter.get_flop_counts()
"""
    subprocess.run([sys.executable, "-c", code], check=True)

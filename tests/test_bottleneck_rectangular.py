"""D_in other than D_out and dropout in front: what does not follow from comparing values."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastadapters
from fastadapters import backends
from fastadapters.functional import bottleneck

BACKENDS = [
    "eager",
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            backends.unavailable("cpu") is not None, reason="needs the compiled library"
        ),
    ),
]
LORA = partial(bottleneck, activation="identity", training=True)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [(1,), (3, 7), (70,)])
@pytest.mark.parametrize("d", [1, 6, 67, 200])
def test_same_elements_are_dropped_as_by_the_definition(
    backend: str, rows: tuple[int, ...], d: int
) -> None:
    """An identity behind the mask shows it; another mask than that of h, of the same seed."""
    x, eye, masks = torch.ones(*rows, d), torch.eye(d), {}
    for name in ("reference", backend):
        with fastadapters.backend(name):
            torch.manual_seed(3)
            masks[name] = LORA(x, eye, eye, input_dropout=0.4)
            torch.manual_seed(3)
            of_h = LORA(x, eye, eye, dropout=0.4)
    assert torch.equal(masks["reference"], masks[backend])
    assert x.numel() < 8 or not torch.equal(masks[backend], of_h)


@pytest.mark.parametrize("backend", BACKENDS)
def test_elements_are_dropped_as_often_as_asked(backend: str) -> None:
    x, eye = torch.ones(4000, 64), torch.eye(64)
    with fastadapters.backend(backend):
        y = LORA(x, eye, eye, input_dropout=0.3)
    assert abs(float((y == 0).double().mean()) - 0.3) < 0.005  # 5 standard deviations
    assert (y[y != 0] - 1 / 0.7).abs().max() < 1e-6
    with fastadapters.backend(backend):
        assert torch.equal(LORA(x, eye, eye, input_dropout=0.3, training=False), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputed_with_the_same_mask(backend: str) -> None:
    x, down, up, residual = leaves((5, 9, 24), (4, 24), (40, 4), (5, 9, 40))
    gradients = []
    for call in (LORA, partial(checkpoint, LORA, use_reentrant=False)):
        torch.manual_seed(5)
        with fastadapters.backend(backend):
            y = call(x, down, up, residual=residual, input_dropout=0.5)
            gradients.append(torch.autograd.grad(y.square().sum(), (x, down, up, residual)))
    assert all(map(torch.equal, *gradients))


def test_compiles_twice_for_all_batch_sizes() -> None:
    down, up = leaves((4, 24), (40, 4))
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    call = torch.compile(partial(LORA, input_dropout=0.5), backend=count, fullgraph=True)
    for batch in (2, 3, 5, 7, 8):
        (x,) = leaves((batch, 24))
        y = call(x, down, up)
        assert y.shape == (batch, 40)
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
    assert count.frame_count <= 2


@pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="needs the compiled library")
def test_flops_are_those_of_two_linear_layers() -> None:
    x, down, up = leaves((6, 24), (4, 24), (40, 4))
    counted = []
    for call in (LORA, lambda x, down, up: F.linear(F.linear(x, down), up)):
        with FlopCounterMode(display=False) as counter, fastadapters.backend("cpu"):
            call(x, down, up).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        ((6, 24), r"residual: expected \[\.\.\., D_out\] = \[6, 40\], got \[6, 24\]"),
        ("x", r"residual: expected \[\.\.\., D_out\] = \[6, 40\], got \[6, 24\]"),
        ((7, 40), r"residual: expected \[\.\.\., D_out\] = \[6, 40\], got \[7, 40\]"),
    ],
)
def test_a_residual_has_the_width_of_the_result(
    residual: tuple[int, ...] | str, message: str
) -> None:
    x, down, up = leaves((6, 24), (4, 24), (40, 4))
    with pytest.raises(ValueError, match=message):
        LORA(x, down, up, residual=x if residual == "x" else torch.ones(residual))

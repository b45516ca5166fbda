"""Empty tensors, zero rows and numbers far out, on every backend that runs here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from module_cases import KINDS, D
from multimodal_cases import arguments as head_arguments
from multimodal_cases import head_tensors
from torch import Tensor

import fastadapters
from fastadapters import backends, functional
from fastadapters.functional import BottleneckParameters, bottleneck, multiway_bottleneck

INF = torch.inf
BACKENDS = ["reference", "eager"]
BACKENDS += [name for name in ("cpu",) if backends.unavailable(name) is None]


def leaves(requires: bool = True) -> dict[str, Tensor]:
    shapes = {
        "down_weight": (4, 8), "up_weight": (8, 4), "down_bias": (4,), "up_bias": (8,),
        "norm_weight": (8,), "norm_bias": (8,), "scale": (8,),
    }  # fmt: skip
    return {name: torch.randn(*shape).requires_grad_(requires) for name, shape in shapes.items()}


@pytest.mark.parametrize("residual", ["x", "other", "none"])
@pytest.mark.parametrize("x_requires_grad", [False, True])
@pytest.mark.parametrize(
    "shape", [(0, 8), (0, 9, 8), (3, 0, 8), (2, 0, 3, 8), (0, 0, 0, 0, 8), (5, 0, 0, 2, 8)], ids=str
)
@pytest.mark.parametrize("name", BACKENDS)
def test_no_rows(name: str, shape: tuple[int, ...], x_requires_grad: bool, residual: str) -> None:
    """x empty: an empty result, an empty dx, and zeros for every parameter."""
    for with_norm in (False, True):
        p = leaves()
        if not with_norm:
            del p["norm_weight"], p["norm_bias"]
        x = torch.randn(shape, requires_grad=x_requires_grad)
        added = {"x": x, "other": torch.randn(shape, requires_grad=True), "none": None}[residual]
        with fastadapters.backend(name):
            y = bottleneck(x, **p, residual=added)
            assert y.shape == shape
            y.sum().backward()
        for parameter in p.values():
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))
        assert not x_requires_grad or x.grad.shape == shape


@pytest.mark.parametrize("shape", [(0, 9, 8), (2, 0, 3, 9, 8)], ids=str)
@pytest.mark.parametrize("split", [-1, 0, 4, 9])
@pytest.mark.parametrize("name", BACKENDS)
def test_no_rows_of_two_adapters(name: str, split: int, shape: tuple[int, ...]) -> None:
    first, second = leaves(), leaves()
    x = torch.randn(shape)
    with fastadapters.backend(name):
        y = multiway_bottleneck(
            x, split, BottleneckParameters(**first), BottleneckParameters(**second), residual=x
        )
        y.sum().backward()
    used = [*first.values()] * (split != 0) + [*second.values()] * (split not in (-1, 9))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in used)


@pytest.mark.parametrize("kind", ["bottleneck", "multiway", "enhancer"])
@pytest.mark.parametrize("name", ["eager", "auto"])
def test_modules_without_rows(kind: str, name: str) -> None:
    module = KINDS[kind][0].func(D, 7)  # type: ignore[attr-defined]
    with fastadapters.backend(name):
        for split in (0, 2, 3) if kind == "multiway" else (None,):
            y = module(torch.randn(0, 3, D), *([] if split is None else [split]))
            y.sum().backward()
            assert y.shape == (0, 3, D)
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def one_row(activation: str, z: float, dy: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """activation(z) and its derivative times dy, through a bottleneck of width 1."""
    x = torch.tensor([[z]], dtype=dtype, requires_grad=True)
    one = torch.ones(1, 1, dtype=dtype)
    y = bottleneck(x, one, one, activation=activation)
    return y.detach(), torch.autograd.grad(y, x, torch.full_like(y, dy))[0]


FAR = (-INF, -3e38, -1e38, -1e30, -1e13, -1e4, -90.0, 90.0, 1e4, 1e13, 1e30, 1e38)
FUNCTIONS = {
    "identity": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
}


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("name", BACKENDS)
def test_activations_far_out(name: str, activation: str) -> None:
    """0 or z, and a derivative of 0 or 1, wherever the formula says so in exact arithmetic."""
    own_gelu_tanh = activation == "gelu_tanh" and name != "cpu"  # PyTorch's: NaN where z^2 is inf
    for dtype in (torch.float32, torch.bfloat16):
        for z in FAR:
            if (z == -INF and activation != "relu") or (own_gelu_tanh and abs(z) > 1e13):
                continue
            with fastadapters.backend(name):
                y, dx = one_row(activation, z, 1.0, dtype)
            rounded = torch.tensor([[z]], dtype=dtype)
            passes = z > 0 or activation == "identity"
            assert torch.equal(y, rounded if passes else torch.zeros_like(y)), (z, dtype)
            assert torch.equal(dx, torch.full_like(dx, float(passes))), (z, dtype)


@pytest.mark.parametrize("name", BACKENDS)
def test_relu_selects(name: str) -> None:
    """Where z <= 0 nothing of dy passes, infinities included; a row of -inf gives the bias."""
    with fastadapters.backend(name):
        for dtype in (torch.float32, torch.bfloat16):
            for z in (-1.0, 0.0, -INF):
                _, dx = one_row("relu", z, INF, dtype)
                assert torch.equal(dx, torch.zeros_like(dx)), z
            for r in (1, 3, 5, 8, 17):
                x = torch.full((2, 6), -INF, dtype=dtype)
                y = bottleneck(x, torch.ones(r, 6), torch.ones(6, r), up_bias=torch.ones(6))
                assert torch.equal(y, torch.ones_like(y)), r


@pytest.mark.parametrize("adapt", ["both", "text", "image"])
@pytest.mark.parametrize("bias", [((-INF, 0.0), (0.0, -INF)), ((0.0, 1.0), (1.0, 0.0))])
@pytest.mark.parametrize("up", [1, 2])
def test_zero_features(up: int, bias: tuple[tuple[float, ...], ...], adapt: str) -> None:
    """A text or an image of zeros has no direction: its own share of the blend is 0."""
    tensors = head_tensors(7, 5, 12, 8, 6, torch.float64, up=up)
    tensors["text"][2] = 0.0
    tensors["image"][3] = 0.0
    options = {"num_heads": 2, "logit_scale": 10.0, "bias": bias, "adapt": adapt}
    results = []
    for name in ("reference", "eager"):
        ts = {n: t.clone().requires_grad_(n not in ("text", "image")) for n, t in tensors.items()}
        with fastadapters.backend(name):
            logits = functional.multimodal_logits(*head_arguments(ts), **options)
        (logits * torch.arange(7)).sum().backward()
        results.append((logits.detach(), *(t.grad for t in ts.values() if t.grad is not None)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)

"""The CUDA kernels where arithmetic ends: infinities, activations far out, LayerNorm's corners."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import bottleneck_cases
import device
import pytest
import torch
from bottleneck_cases import Case
from compare import check_all, last_bit
from torch import Tensor

import fastadapters
from fastadapters import functional

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason=device.TOOLS),
    pytest.mark.usefixtures("simulated"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
INF = torch.inf


def step(backend: str, tensors: dict[str, Tensor], dy: Tensor, **options: Any) -> dict[str, Tensor]:
    """y, and the gradient of every tensor."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    with fastadapters.backend(backend):
        y = functional.bottleneck(**leaves, **options)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(y, [*leaves.values()], dy)
    named = zip((f"d_{name}" for name in leaves), gradients, strict=True)
    return {"y": y.detach(), **dict(named)}


def small(dtype: torch.dtype, r: int = 3) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(0)
    shapes = {"x": (5, 24), "down_weight": (r, 24), "down_bias": (r,), "up_weight": (24, r)}
    return {n: torch.rand(*shape, generator=gen).to(dtype) for n, shape in shapes.items()}


@DTYPES
def test_relu_selects_in_backward(dtype: torch.dtype) -> None:
    """Where z < 0 an infinite dy is not multiplied; nor is it with what lies beyond r."""
    tensors = small(dtype)
    tensors["down_bias"] -= 100
    dy = torch.ones(5, 24, dtype=dtype)
    dy[1, 2] = INF
    with device.simulate(80):
        out = step("cuda", tensors, dy)
    for name in ("d_x", "d_down_weight", "d_down_bias"):
        assert torch.equal(out[name], torch.zeros_like(out[name])), name


@DTYPES
@pytest.mark.parametrize("r", [3, 33])
def test_relu_of_an_infinite_x(r: int, dtype: torch.dtype) -> None:
    """z = -inf gives 0, and there is no z beyond r."""
    tensors = small(dtype, r)
    tensors["x"][1, 2] = -INF
    with device.simulate(80):
        out = step("cuda", tensors, torch.ones(5, 24, dtype=dtype))
    expected = step("reference", tensors, torch.ones(5, 24, dtype=dtype))
    assert torch.isfinite(out["y"]).all()
    assert torch.equal(out["y"][1], expected["y"][1])


@pytest.mark.parametrize("z", [1e13, 1e20, 1e38])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "quick_gelu", "relu"])
def test_activations_far_out(activation: str, z: float) -> None:
    """z or 0, with slope 1 or 0."""
    tensors = {
        "x": torch.zeros(2, 8),
        "down_weight": torch.zeros(2, 8),
        "down_bias": torch.tensor([z, -z]),
        "up_weight": torch.eye(8, 2),
    }
    with device.simulate(80):
        out = step("cuda", tensors, torch.ones(2, 8), activation=activation)
    assert torch.equal(out["y"][:, :2], torch.tensor([[z, 0.0]] * 2))
    assert torch.equal(out["d_down_bias"], torch.tensor([2.0, 0.0]))


def check(case: Case, change: Callable[[dict[str, Tensor]], None], **options: Any) -> None:
    """The sample with some tensors changed, under the rule of compare.py."""
    tensors = bottleneck_cases.inputs(case)
    change(tensors)
    cotangent = tensors.pop("cotangent")
    options |= {"activation": case.activation, "scale": 0.6}

    def run(backend: str, inputs: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
        return step(backend, inputs, dy, **options)

    def pair(draw: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        moved = {n: t if n == "x" else last_bit(t, draw, case.dtype) for n, t in tensors.items()}
        exact = {n: t.double() for n, t in moved.items()}
        return run("reference", exact, cotangent.double()), run("reference", moved, cotangent)

    with device.simulate(80):
        out = run("cuda", tensors, cotangent)
    check_all(out, pair, str(case))


@pytest.mark.parametrize(
    ("dtype", "eps"),
    [(BF16, 1e-5), (FP16, 1e-5), (FP32, 1e-5), (BF16, 1e-12), (FP32, 1e-12)],
    ids=str,
)
def test_layer_norm_of_equal_elements(dtype: torch.dtype, eps: float) -> None:
    """Nothing is left of a row of equal elements, however large rstd makes the rounding errors."""

    def equal_elements(tensors: dict[str, Tensor]) -> None:
        tensors["x"] = torch.linspace(-9.7, 7.3, 6, dtype=dtype)[:, None].expand(6, 768)

    case = Case(
        rows=(6,), d=768, r=40, dtype=dtype, activation="gelu", norm="both", residual="none"
    )
    check(case, equal_elements, norm_eps=eps)


@DTYPES
def test_layer_norm_under_a_large_bias(dtype: torch.dtype) -> None:
    """The signal in z is small against Wd beta + bd, which dx is made without."""

    def large_bias(tensors: dict[str, Tensor]) -> None:
        tensors["down_bias"] += 100

    case = Case(rows=(70,), d=200, r=40, dtype=dtype, activation="identity", norm="both")
    check(replace(case, residual="none"), large_bias)

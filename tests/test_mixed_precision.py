"""fp32 storage beside 16-bit products: what autocast makes of a trained model."""

from __future__ import annotations

import pytest
import torch
from bottleneck_cases import Case, check_backend, inputs, mixed_cases
from torch import Tensor

from fastadapters import backends, functional

BACKENDS = [n for n, problem in backends.status().items() if problem is None and n != "reference"]
HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case", [c for dtype in HALF for c in mixed_cases(dtype, d=100, r=20)], ids=str
)
def test_options(case: Case, backend: str) -> None:
    out = check_backend(case, backend)
    assert out["y"].dtype == case.out_dtype
    for name, t in inputs(case).items():
        assert name == "cotangent" or out[f"d_{name}"].dtype == t.dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [(), (0,), (1,), (65,), (2, 3, 33)])
def test_shapes(rows: tuple[int, ...], backend: str) -> None:
    for norm in ("none", "both"):
        check_backend(
            Case(rows=rows, d=130, r=33, dtype=torch.bfloat16, x_dtype=torch.float32, norm=norm),
            backend,
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF)
def test_zero_adapter_is_the_identity(dtype: torch.dtype, backend: str) -> None:
    x, down, up = torch.randn(33, 40), torch.randn(8, 40), torch.zeros(40, 8)
    with torch.autocast("cpu", dtype), backends.backend(backend):
        for residual in (x, torch.randn_like(x)):
            y = functional.bottleneck(x, down, up, residual=residual)
            assert torch.equal(y, residual)


@pytest.mark.parametrize("backend", BACKENDS)
def test_residuals_of_other_dtypes(backend: str) -> None:
    """The result has the dtype that PyTorch's sum would have; every gradient its tensor's."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for x_dtype in dtypes:
        for residual_dtype in dtypes:
            x = torch.randn(9, 24, dtype=x_dtype, requires_grad=True)
            residual = torch.randn(9, 24, dtype=residual_dtype, requires_grad=True)
            down = torch.randn(5, 24, dtype=x_dtype)
            with backends.backend(
                "auto" if torch.float64 in (x_dtype, residual_dtype) else backend
            ):
                y = functional.bottleneck(x, down, down.T, residual=residual)
            assert y.dtype == torch.promote_types(x_dtype, residual_dtype)
            y.sum().backward()
            assert x.grad is not None and x.grad.dtype == x_dtype
            assert torch.equal(residual.grad, torch.ones_like(residual))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_of_autocast(backend: str) -> None:
    """As the same formula in plain PyTorch: with a learnable scale the sum is as wide as that."""
    down, up = torch.randn(5, 24), torch.randn(24, 5)

    def plain(x: Tensor, residual: Tensor | None, scale: float | Tensor) -> Tensor:
        y = torch.relu(x @ down.T) @ up.T * scale
        return y if residual is None else residual + y

    scales = (0.5, torch.ones(1), torch.ones(24))
    with torch.autocast("cpu", torch.bfloat16), backends.backend(backend):
        for x in (torch.randn(9, 24), torch.randn(9, 24).bfloat16()):
            for residual in (None, x, torch.randn(9, 24), torch.randn(9, 24).bfloat16()):
                for scale in scales:
                    y = functional.bottleneck(x, down, up, residual=residual, scale=scale)
                    assert y.dtype == plain(x, residual, scale).dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_multiway(backend: str) -> None:
    """Each token as its own adapter alone would have it, the residual stream in fp32."""
    case = Case(d=40, r=8, dtype=torch.bfloat16, x_dtype=torch.float32, residual="none")
    x = torch.randn(2, 7, 40, requires_grad=True)
    sides = []
    for seed in (1, 2):
        tensors = inputs(case, seed)
        del tensors["x"], tensors["cotangent"]
        sides.append({name: t.requires_grad_() for name, t in tensors.items()})
    leaves = [x, *sides[0].values(), *sides[1].values()]
    results = []
    for fused in (True, False):
        with torch.autocast("cpu", torch.bfloat16), backends.backend(backend):
            if fused:
                parameters = (functional.BottleneckParameters(**side) for side in sides)
                y = functional.multiway_bottleneck(x, 3, *parameters, residual=x)
            else:
                parts = zip((x[:, :3], x[:, 3:]), sides, strict=True)
                y = torch.cat([functional.bottleneck(p, **s, residual=p) for p, s in parts], 1)
        assert y.dtype == torch.float32
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for fused, apart in zip(*results, strict=True):
        assert torch.equal(fused, apart)


def test_samples_have_every_combination() -> None:
    for dtype in HALF:
        kinds = {(c.x_dtype or dtype, c.out_dtype) for c in mixed_cases(dtype)}
        assert kinds == {(a, b) for a in (dtype, torch.float32) for b in (dtype, torch.float32)} - {
            (dtype, dtype)
        }

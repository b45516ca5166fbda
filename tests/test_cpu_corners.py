"""The CPU kernels where rounding, infinities and the ends of the range decide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bottleneck_cases import Case, inputs, reference_pair
from compare import check_all
from cpu_kernels import ISAS, OWN_KERNELS, call, check_kernels, choose
from torch import Tensor

from fastadapters import reference
from fastadapters.ops.bottleneck import PARAMETERS
from fastadapters.ops.codes import ACTIVATION_CODES, DTYPE_CODES

EACH_KERNEL = pytest.mark.parametrize(("isa", "dtype"), OWN_KERNELS, ids=str)


def check_special(kernels: Any, case: Case, tensors: dict[str, Tensor]) -> None:
    """Infinities and NaN where the definition has them, and the rest under the rule."""
    out = call(kernels, case, tensors)
    pair = reference_pair(case, tensors)
    expected = pair(0)[1]
    finite = {}
    for name, t in out.items():
        rounded = expected[name].float()
        finite[name] = torch.isfinite(rounded)
        special = torch.where(finite[name], torch.zeros(()), rounded)
        ours = torch.where(finite[name], torch.zeros(()), t.float())
        assert torch.equal(torch.nan_to_num(ours, 7.0), torch.nan_to_num(special, 7.0)), name

    def where_finite(draw: int) -> list[dict[str, Tensor]]:
        return [{name: t[finite[name]] for name, t in side.items()} for side in pair(draw)]

    check_all({name: t[finite[name]] for name, t in out.items()}, where_finite, str(case))


@EACH_KERNEL
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_where_it_belongs(
    value: float,
    isa: str,
    dtype: torch.dtype,
    kernels: Any,
) -> None:
    """Padding of rows, of D and of an odd r multiplies nothing of the caller's."""
    choose(isa)
    for rows, d, r in ((5, 100, 33), (3, 7, 3)):
        case = Case(rows=(rows,), d=d, r=r, dtype=dtype, residual="other", norm="none")
        for name, tensor in inputs(case).items():
            tensors = inputs(case)
            tensors[name] = tensor.clone()
            tensors[name][(0,) * tensor.dim()] = value
            check_special(kernels, case, tensors)


@EACH_KERNEL
def test_relu_of_minus_infinity(isa: str, dtype: torch.dtype, kernels: Any) -> None:
    choose(isa)
    case = Case(rows=(4,), d=64, r=17, dtype=dtype, residual="none")
    tensors = inputs(case)
    tensors["down_weight"] = tensors["down_weight"].abs() + 0.1
    tensors["x"][1, 5] = -torch.inf
    y = call(kernels, case, tensors)["y"]
    assert torch.isfinite(y).all()
    check_special(kernels, case, tensors)


@EACH_KERNEL
@pytest.mark.parametrize("z", [-1.0, 0.0, 1.0])
def test_relu_selects_in_backward(
    z: float,
    isa: str,
    dtype: torch.dtype,
    kernels: Any,
) -> None:
    choose(isa)
    case = Case(rows=(1,), d=1, r=1, dtype=dtype, residual="none", up_bias=False)
    one = torch.ones(1, 1, dtype=dtype)
    tensors = {"x": z * one, "down_weight": one, "down_bias": 0 * one[0], "up_weight": one}
    tensors["cotangent"] = torch.inf * one
    out = call(kernels, case, tensors)
    expected = torch.inf if z > 0 else 0.0
    assert out["d_x"].item() == out["d_down_bias"].item() == expected


@EACH_KERNEL
@pytest.mark.parametrize("norm_eps", [1e-5, 1e-12])
def test_constant_row_under_layernorm(
    norm_eps: float,
    isa: str,
    dtype: torch.dtype,
    kernels: Any,
) -> None:
    """A row's mean is exact where all its elements are equal, as PyTorch's is."""
    choose(isa)
    case = Case(rows=(6,), d=768, r=16, dtype=dtype, norm="both", residual="none")
    tensors = inputs(case)
    values = torch.tensor([0.1, -1 / 3, 3.7, 123.4, 1e4, 0.0])
    tensors["x"] = values.to(dtype).unsqueeze(1).expand(6, 768).contiguous()
    out = call(kernels, case, tensors, norm_eps)["y"]

    def pair(draw: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        sides = []
        for to in (torch.float64, dtype):
            cast = {name: t.to(to) for name, t in tensors.items() if name != "cotangent"}
            y = reference.bottleneck(**cast, activation="relu", scale=0.6, norm_eps=norm_eps)
            sides.append({"y": y})
        return sides[0], sides[1]

    check_all({"y": out}, pair)


@EACH_KERNEL
def test_large_bias_under_layernorm(isa: str, dtype: torch.dtype, kernels: Any) -> None:
    """The gradient through the norm must not be found from z less its bias."""
    choose(isa)
    case = Case(rows=(40,), d=128, r=24, dtype=dtype, norm="both", residual="none")
    tensors = inputs(case)
    tensors["down_bias"] = tensors["down_bias"] + 100
    check_all(call(kernels, case, tensors), reference_pair(case, tensors))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ACTIVATION_CODES)
def test_activations_far_out(name: str, isa: str, kernels: Any) -> None:
    """With weights of 1, z is x: over all magnitudes, where the limits are reached and NaN."""
    choose(isa)
    far = torch.logspace(1.31, 38.5, 400, dtype=torch.float64).float()
    near = torch.tensor([0.0, -0.0, 1e-45, 1e-38, 1e-20, 1e-3])
    x = torch.cat([far, -far, near, -near, torch.tensor([torch.inf, -torch.inf, torch.nan])])
    x = x.unsqueeze(1)
    one = torch.ones(1, 1)
    parameters = [one if p in ("down_weight", "up_weight") else None for p in PARAMETERS]
    code = DTYPE_CODES[torch.float32]
    options = (None, 1.0, 1e-5, 0.0, 0.0, ACTIVATION_CODES[name], code, code, False)
    y, z, stats = kernels.bottleneck_forward(x, None, *parameters, *options, True)
    dx = kernels.bottleneck_backward(torch.ones_like(x), x, z, stats, *parameters, *options, 1)[0]
    gold_x = x.double().requires_grad_()
    gold = reference.bottleneck(gold_x, one.double(), one.double(), activation=name)
    (gold_dx,) = torch.autograd.grad(gold.sum(), gold_x)
    for out, right in ((y, gold), (dx, gold_dx)):
        defined = ~right.isnan()
        assert out[x.isnan() & ~defined].isnan().all()
        torch.testing.assert_close(
            out[defined], right[defined].float(), rtol=1e-5, atol=1e-37, msg=lambda m: f"{name} {m}"
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("d", "r"), [(200, 63), (768, 64)])
def test_few_rows_are_summed_as_exactly_as_eagerly(
    d: int,
    r: int,
    isa: str,
    kernels: Any,
) -> None:
    """Over many samples, so that no lucky rounding decides: the rms errors of fp32."""
    choose(isa)
    for rows in (1, 3, 16):
        case = Case(rows=(rows,), d=d, r=r, norm="both", scale="channel", activation="gelu")
        squares: dict[str, list[float]] = {}
        for seed in range(24):
            tensors = inputs(case, seed)
            out = call(kernels, case, tensors)
            gold, base = reference_pair(case, tensors)(0)
            for name, t in out.items():
                errors = [(side[name] - gold[name]).square().sum().item() for side in (out, base)]
                total = squares.setdefault(name, [0.0, 0.0])
                squares[name] = [a + b for a, b in zip(total, errors, strict=True)]
                assert t.dtype == torch.float32
        for name, (ours, base_square) in squares.items():
            assert ours <= 1.25**2 * base_square, f"{rows} rows, {name}: {ours / base_square:.2f}"


def test_sums_over_many_rows(kernels: Any) -> None:
    """Tile by tile in one chain they were twice as far off as the definition's."""
    choose("portable")
    check_kernels(kernels, Case(rows=(2**18,), d=32, r=8, residual="none", activation="gelu"))

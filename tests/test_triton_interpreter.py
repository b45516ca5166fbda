"""The Triton kernels in Triton's interpreter, through the op: what they compute."""

from __future__ import annotations

from dataclasses import replace

import bottleneck_cases
import pytest
import test_multiway
import torch
from bottleneck_cases import Case, mixed_cases, option_cases, rectangular_cases, shape_cases
from compare import check_all, named
from interpreter import interpreted, run_in_a_process_of_its_own

from fastadapters import backend, backends, functional, reference

pytest.importorskip("triton")

FP32 = torch.float32


def test_in_a_process_of_its_own() -> None:
    run_in_a_process_of_its_own(__file__)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend take CPU tensors, and cut them into few programs, as suits it."""
    from fastadapters.kernels.bottleneck import tiles

    monkeypatch.setattr(backends, "_why_not", lambda *args: None)
    monkeypatch.setattr(tiles, "tile", lambda *key: tiles.Tile(64, 128, 4, 1))
    monkeypatch.setattr(tiles, "REDUCE_BLOCK_D", 128)
    monkeypatch.setattr(tiles, "NORM_BLOCK_R", 16)


# With relu a rounding can turn the gradient of an element on or off, which no tolerance covers.
CASES = [
    *option_cases(dtype=torch.float32),
    *option_cases(dtype=torch.float16),
    *(
        replace(case, activation="silu") if case.activation == "relu" else case
        for case in mixed_cases(torch.float16)
    ),
    *(replace(case, activation="silu") for case in shape_cases(dtype=torch.float32)),
    *rectangular_cases(dtype=torch.float32),
    Case(rows=(1,), d=1, d_out=6, r=1, input_dropout=0.5, residual="other"),
    Case(rows=(0,), d=8, d_out=6, r=1, input_dropout=0.5, residual="other"),
    Case(rows=(70,), d=100, d_out=40, r=300, norm="both", input_dropout=0.3, residual="none"),
    Case(rows=(70,), d=100, r=300, activation="gelu", norm="both", dropout=0.3),
    Case(rows=(100,), d=40, r=300, dtype=torch.float16, activation="gelu", scale="channel"),
    Case(rows=(50,), dtype=torch.float16, param_dtype=torch.float32, norm="both"),
    Case(rows=(2, 3, 2, 7), layout="transposed", cotangent="expanded"),
]


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: Case) -> None:
    bottleneck_cases.check_backend(case, "triton")


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
def test_large_mean_does_not_cancel() -> None:
    """LayerNorm of rows whose mean is 100 deviations."""
    case = Case(rows=(40,), d=200, r=16, norm="both", activation="gelu", residual="none")
    tensors = bottleneck_cases.inputs(case)
    tensors["x"] = tensors["x"] + 100.0
    out = bottleneck_cases.run(case, tensors, "triton")
    check_all(out, bottleneck_cases.reference_pair(case, tensors))


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
def test_the_mask_of_the_input_is_the_definition() -> None:
    """Offset 2^64 - 1, whose next is 0: what of ones arrives is the mask, and dx the same."""
    from fastadapters.kernels.bottleneck import ops

    m, d, p = 9, 37, 0.3
    seed = torch.tensor([2**62 + 7, -1])
    expected = reference.philox.dropout_multiplier(torch.tensor([2**62 + 7, 0]), m, d, p, FP32)
    ones, eye = torch.ones(m, d), torch.eye(d)
    rest = (eye, None, eye, None, None, None, None, seed, 1.0, 1e-5, 0.0, p, 0, 0, 0, False)
    y, z, stats = ops.bottleneck_forward(ones, None, *rest, True)
    dx, *_ = ops.bottleneck_backward(ones, ones, z, stats, *rest, 1)
    assert 0.2 < y.eq(0).float().mean() < 0.4
    assert torch.equal(y, expected) and torch.equal(dx, expected)


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
def test_two_adapters_share_one_output() -> None:
    tensors = list(test_multiway.sample(torch.float32, (16, 24)))
    arguments = (17, "x", 0.2)
    out = test_multiway.run(tensors, *arguments, "triton", op=True)
    check_all(named(out), test_multiway.reference_pair(tensors, *arguments))


def both(
    tensors: dict[str, torch.Tensor], cotangent: torch.Tensor, **options: object
) -> list[list[torch.Tensor]]:
    """y and all gradients, of the kernels and of the reference in float64."""
    results = []
    for name, dtype in (("triton", cotangent.dtype), ("reference", torch.float64)):
        leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in tensors.items()}
        with backend(name):
            y = functional.bottleneck(**leaves, **options)  # type: ignore[arg-type]
        results.append([y, *torch.autograd.grad(y, [*leaves.values()], cotangent.to(dtype))])
    return results


FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
@FLOATS
@pytest.mark.parametrize("r", [1, 3, 16])
def test_infinities_where_relu_is_zero(dtype: torch.dtype, r: int) -> None:
    """x = -inf and dy = inf come to nothing, in the padding of r as well."""
    x = torch.tensor([[-torch.inf, 1.0], [-1.0, -1.0], [2.0, 1.0]], dtype=dtype)
    tensors = {"x": x, "down_weight": torch.ones(r, 2), "up_weight": torch.ones(2, r)}
    cotangent = torch.tensor([1.0, torch.inf, 1.0], dtype=dtype)[:, None].expand(3, 2)
    (y, dx, *_), (gold, d_gold, *_) = both(tensors, cotangent)
    assert gold[0].tolist() == d_gold[0].tolist() == d_gold[1].tolist() == [0.0, 0.0]
    assert torch.equal(y.double(), gold) and torch.equal(dx.double(), d_gold)


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "quick_gelu"])
def test_activations_far_out(activation: str) -> None:
    x = torch.logspace(0, 37, 100)[:, None] * torch.tensor([1.0, -1.0])
    x = x.reshape(-1, 1)
    one = torch.ones(1, 1)
    tensors = {"x": x, "down_weight": one, "up_weight": one}
    (y, dx, *_), (gold, d_gold, *_) = both(tensors, torch.ones_like(x), activation=activation)
    torch.testing.assert_close(y.double(), gold, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dx.double(), d_gold, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
@FLOATS
@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_constant_rows_under_layernorm(dtype: torch.dtype, eps: float) -> None:
    """Nothing is left of them but the offsets, at any eps."""
    case = Case(rows=(9,), d=768, r=16, dtype=dtype, norm="both", residual="none")
    tensors = bottleneck_cases.inputs(case)
    cotangent = tensors.pop("cotangent")
    tensors["x"] = torch.linspace(-9, 9, 9)[:, None].expand(9, 768).to(dtype).contiguous()
    (y, *_), (gold, *_) = both(tensors, cotangent, norm_eps=eps)
    error = (y.double() - gold).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * gold.abs().max()


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
def test_large_offsets_leave_the_gradient_of_layernorm() -> None:
    case = Case(rows=(70,), dtype=torch.float16, norm="both", activation="gelu", residual="none")
    tensors = bottleneck_cases.inputs(case)
    tensors["down_bias"] += 100
    out = bottleneck_cases.run(case, tensors, "triton")
    check_all(out, bottleneck_cases.reference_pair(case, tensors))

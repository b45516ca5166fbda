"""The Triton kernels in Triton's interpreter, through the op: what they compute."""

from __future__ import annotations

from dataclasses import replace

import bottleneck_cases
import grouped_cases
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
    *option_cases(dtype=torch.float16)[1::3],
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


def few_groups_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastadapters.kernels.bottleneck import groups

    monkeypatch.setattr(groups, "BLOCK_N", 4)


@interpreted
@pytest.mark.parametrize(("adapters", "rows_each"), [(1, 20), (6, 1)])
def test_rows_in_the_order_of_their_adapters(
    adapters: int, rows_each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row in one tile, in order, and every run of one adapter; -1 where it is none."""
    from fastadapters.kernels.bottleneck.groups import make_groups

    few_groups_at_a_time(monkeypatch)
    for seed, count in enumerate((1, 5, 70 // rows_each)):
        gen = torch.Generator().manual_seed(seed)
        index = torch.randint(-1, adapters + 2, (count,), generator=gen)
        groups = make_groups(index, adapters, count * rows_each, 16, 48)
        owners = index.repeat_interleave(rows_each)
        owners = torch.where((owners < 0) | (owners >= adapters), adapters, owners)
        assert torch.equal(groups.order.long(), owners.argsort(stable=True))
        counts = owners.bincount(minlength=adapters + 1)
        for (table, firsts), length in ((groups.tiles, 16), (groups.splits, 48)):
            full = table[: firsts[-1]].long()
            assert table[firsts[-1] :, 1].equal(table[firsts[-1] :, 2])
            runs = (counts + length - 1) // length
            assert firsts.diff().tolist() == runs.tolist()
            assert (full[:, 2] - full[:, 1]).min() > 0
            places = torch.cat([torch.arange(begin, end) for _, begin, end in full.tolist()])
            assert torch.equal(places, torch.arange(count * rows_each))
            of_runs = full[:, 0].repeat_interleave(full[:, 2] - full[:, 1])
            assert torch.equal(of_runs % (adapters + 1), owners[groups.order.long()])


GROUPED = [
    Case(rows=(4, 40), dtype=torch.float16, activation="gelu", scale="learnable"),
    Case(rows=(4, 40), activation="silu", residual="none", norm="weight", layout="transposed"),
    *rectangular_cases(rows=(4, 30), dtype=FP32)[2:4],
    mixed_cases(torch.float16, rows=(4, 40), activation="silu")[7],
    Case(rows=(2, 20), d=40, r=140, activation="gelu", dropout=0.3),
    Case(rows=(0, 7), norm="both", scale="learnable"),
]


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("case", GROUPED, ids=str)
def test_an_adapter_per_item(case: Case) -> None:
    grouped_cases.check_backend(case, grouped_cases.index_of(case), "triton")


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
def test_an_adapter_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    few_groups_at_a_time(monkeypatch)
    case = Case(rows=(3, 25), d=40, r=10, norm="both", scale="channel", layout="slice")
    index = grouped_cases.index_of(case, 2).int()
    out = grouped_cases.check_backend(case, index, "triton")
    for name in ("down_weight", "up_weight", "down_bias", "up_bias", "norm_weight", "scale"):
        occurs = [bool((g != 0).any()) for g in out[f"d_{name}"]]
        assert occurs == [True, False, True, True], name


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
def test_what_occurs_nowhere_and_what_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent adapters may be NaN; rows of none become NaN, and nothing else does."""
    case = Case(rows=(5, 20), norm="both", scale="channel", residual="other")
    tensors = grouped_cases.inputs(case)
    index = torch.tensor([2, 0, 2, 3, 0])
    expected = grouped_cases.run(case, tensors, index, "triton")
    for name, t in tensors.items():
        if name not in grouped_cases.UNSTACKED:
            t[1] = torch.nan
    tensors["x"][3] = torch.nan
    monkeypatch.setattr(functional.grouped, "_check_index", lambda index, *rest: index)
    index[3] = 4
    out = grouped_cases.run(case, tensors, index, "triton")
    known = torch.tensor([0, 1, 2, 4])
    assert out["y"][3].isnan().all() and out["d_x"][3].eq(0).all()
    for name in ("y", "d_x", "d_residual"):
        assert torch.equal(out[name][known], expected[name][known]), name
    for name, t in out.items():
        if name not in ("y", "d_x", "d_residual"):
            assert t[1].eq(0).all() and t[3].eq(0).all(), name
            assert torch.equal(t[[0, 2]], expected[name][[0, 2]]), name


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
def test_any_number_of_modalities() -> None:
    test_multiway.check_many("widths", "x", "triton")

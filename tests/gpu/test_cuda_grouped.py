"""The CUDA kernels on rows of several adapters, run on the PTX machine through the op."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cuda_backend
import device
import grouped_cases
import pytest
import test_multiway
import torch
from bottleneck_cases import LORA, Case
from grouped_cases import ADAPTERS, check_backend, index_of, inputs, run
from schedules import same_under_schedules, unneeded
from torch import Tensor

from fastadapters.functional import bottleneck
from fastadapters.ops.codes import DTYPE_CODES

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason=device.TOOLS),
    pytest.mark.usefixtures("simulated"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHITECTURES = pytest.mark.parametrize("arch", cuda_backend.ARCHITECTURES, ids="sm_{}".format)

# Over how many of the leading dimensions there is an index, and the sample.
CASES = [
    (1, Case((6, 17), 100, 33, dtype=BF16, norm="both", activation="gelu", scale="learnable")),
    (1, replace(LORA, rows=(5, 20), d=72, d_out=130, r=8, dtype=FP16, input_dropout=0.2)),
    (1, Case((400,), 40, 8, dtype=BF16, dropout=0.3, scale="channel", residual="other")),
    (1, Case((300,), 40, 10, activation="silu", up_bias=False)),
    (2, Case((2, 40), 72, 70, dtype=FP16, dropout=0.2, residual="none", scale="learnable")),
    (2, Case((5, 7, 4), 72, dtype=FP32, layout="transposed", norm="weight", activation="silu")),
    (2, Case((3, 40), 130, 20, dtype=BF16, norm="both", input_dropout=0.3, activation="gelu")),
    (1, Case((3, 30), 50, 24, dtype=FP16, layout="slice", cotangent="expanded", down_bias=False)),
    (1, Case((4, 20), 72, 40, dtype=BF16, x_dtype=FP32, param_dtype=FP32, norm="both")),
    (1, Case((4, 20), 72, 16, dtype=FP16, x_dtype=FP32, residual="none", activation="gelu")),
    (1, Case((90,), 72, 16, dtype=BF16, residual="other", residual_dtype=FP32, dropout=0.2)),
    (1, Case((0, 5), 64, 8, dtype=BF16, scale="learnable")),
]


@pytest.mark.parametrize(("dims", "case"), CASES, ids=str)
def test_matches_reference(dims: int, case: Case) -> None:
    """All gradients; an index that is in no order; an adapter that occurs nowhere."""
    index = index_of(case, dims)
    out = same_under_schedules(
        str(case),
        80 if CASES.index((dims, case)) % 2 else 90,
        lambda: check_backend(case, index, "cuda"),
        lambda: run(case, inputs(case), index, "cuda"),
    )
    for name in out.keys() - {"y", "d_x", "d_residual"}:
        assert out[name][1].eq(0).all(), name


def test_an_adapter_that_does_not_occur_is_not_read() -> None:
    case = Case((4, 20), 40, dtype=BF16, param_dtype=FP32, norm="both", scale="channel")
    tensors, index = inputs(case), index_of(case)
    for name in tensors.keys() - {"x", "cotangent"}:
        tensors[name][1] = torch.nan
    with device.simulate(80) as simulation:
        out = run(case, tensors, index, "cuda")
    for name, t in out.items():
        assert t.isfinite().all(), name
        assert name in ("y", "d_x") or t[1].eq(0).all(), name
    occurring = tensors["down_weight"][index.unique()].nbytes
    for report in simulation.launches:
        if "prepare_weights" in report.name:
            assert report.traffic(tensors["down_weight"]).read_unique == occurring


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_one_adapter_for_all_is_the_bottleneck(dtype: torch.dtype) -> None:
    """Bit for bit, dropout and gradients included."""
    case = Case((3, 50), 72, 40, norm="both", scale="channel", dropout=0.3, dtype=dtype)
    tensors = inputs(case)
    own = {n: t if n in ("x", "cotangent") else t[2] for n, t in tensors.items()}
    with device.simulate(80):
        grouped = run(case, tensors, torch.full((3,), 2), "cuda")
        alone = run(
            case, own, torch.empty(0), "cuda", op=lambda x, _, **rest: bottleneck(x, **rest)
        )
    for name, t in alone.items():
        assert torch.equal(t, grouped[name] if name in ("y", "d_x") else grouped[name][2]), name


def test_rows_of_no_adapter(simulated: Any) -> None:
    """They become NaN, and leave the others' rows and gradients as they are without them."""
    case = Case((90,), 40, 8, dtype=BF16, residual="none")
    tensors = inputs(case)
    gen = torch.Generator().manual_seed(0)
    index = torch.randint(-1, ADAPTERS + 1, case.rows, generator=gen)
    known = (index >= 0) & (index < ADAPTERS)
    less = {n: t[known] if n in ("x", "cotangent") else t for n, t in tensors.items()}

    def step(tensors: dict[str, Tensor], index: Tensor) -> list[Tensor]:
        x, dy, (down, down_bias, up, up_bias) = (
            tensors["x"],
            tensors["cotangent"],
            (tensors[name] for name in ("down_weight", "down_bias", "up_weight", "up_bias")),
        )
        weights = (down, down_bias, up, up_bias, None, None, None, None, index)
        options = (0.5, 1e-5, 0.0, 0.0, 1, DTYPE_CODES[BF16], DTYPE_CODES[BF16], False)
        y, z, stats = simulated.grouped_forward(x, None, *weights, *options, True)
        gradients = simulated.grouped_backward(dy, x, z, stats, *weights, *options, 0b11111)
        return [y, *gradients[:5]]

    with device.simulate(80):
        y, dx, *gradients = step(tensors, index)
        y_less, dx_less, *gradients_less = step(less, index[known])
    assert y[~known].isnan().all() and dx[~known].isnan().all()
    assert torch.equal(y[known], y_less) and torch.equal(dx[known], dx_less)
    assert all(map(torch.equal, gradients, gradients_less))


def launched(adapters: int, index: Tensor, arch: int = 80) -> tuple[device.Simulation, Any]:
    """A training step of [320, 256], r 40, with its x, y, dy and dx."""
    case = Case((4, 80), 256, 40, dtype=BF16)
    tensors = inputs(case, adapters)
    kept: dict[str, Tensor] = {"x": tensors["x"], "dy": tensors["cotangent"]}
    with device.simulate(arch) as simulation:
        out = run(case, tensors, index, "cuda")
    return simulation, kept | {"y": out["y"], "dx": out["d_x"]}


@ARCHITECTURES
@pytest.mark.parametrize("dims", [1, 2])
def test_traffic(dims: int, arch: int) -> None:
    """Of x, y and their gradients as for one adapter, in whole lines; launches are as many."""
    gen = torch.Generator().manual_seed(1)
    index = torch.randint(9, (4, 80)[:dims], generator=gen)
    several, t = launched(9, index, arch)
    one, of_one = launched(1, torch.zeros_like(index), arch)
    assert [r.name for r in several.launches] == [r.name for r in one.launches]
    for kernel in ("data_pass", "weight_pass"):
        reports = several.total(kernel), one.total(kernel)
        for name in t:
            traffic, expected = reports[0].traffic(t[name]), reports[1].traffic(of_one[name])
            assert (traffic.read, traffic.written) == (expected.read, expected.written), name
            assert traffic.partial_read_lines == traffic.partial_written_lines == 0
        assert reports[0].conflict_ratio == 1.0


@pytest.mark.parametrize("kind", ["widths", "scales"])
def test_many_modalities_are_one_launch(kind: str) -> None:
    with device.simulate(80) as simulation:
        test_multiway.test_any_number_of_modalities(kind, "x", "cuda")
    assert sum("data_pass" in report.name for report in simulation.launches) == 2


def test_every_synchronisation_of_the_plan_is_needed(simulated: Any) -> None:
    """Several rows an entry; more than 256 entries, and more than 256 sums of each kind."""
    gen = torch.Generator().manual_seed(0)
    index = torch.randint(9, (300,), generator=gen) * 32
    x = torch.randn(300, 2, 8, generator=gen).to(BF16)
    down, up = (torch.randn(260, *shape, generator=gen).to(BF16) for shape in ((2, 8), (8, 2)))
    weights = (down, None, up, None, None, None, None, None, index)
    options = (0.5, 1e-5, 0.0, 0.0, 1, DTYPE_CODES[BF16], DTYPE_CODES[BF16], True)

    def forward() -> list[Tensor]:
        return [simulated.grouped_forward(x, None, *weights, *options, False)[0]]

    def backward() -> list[Tensor]:
        z, stats = x.new_ones(600, 2), torch.zeros(0)
        return list(simulated.grouped_backward(x, x, z, stats, *weights, *options, 0b1010)[1:4:2])

    runs: list[Callable[[], list[Tensor]]] = [forward, backward]
    for kernel in ("count_entries", "find_begins", "place_rows"):
        (name,) = device.cuda_kernels(kernel)
        assert not unneeded(80, name, runs), kernel


def test_too_many_adapters(simulated: Any) -> None:
    x, weight = torch.zeros(2, 1), torch.zeros(60001, 1, 1)
    rest = (weight, None, weight, *[None] * 5, torch.zeros(2).long())
    options = (1.0, 1e-5, 0.0, 0.0, 1, DTYPE_CODES[FP32], DTYPE_CODES[FP32], False, False)
    with (
        device.simulate(80),
        pytest.raises(RuntimeError, match="too many rows, columns or adapters"),
    ):
        simulated.grouped_forward(x, None, *rest, *options)


def test_index_is_checked(simulated: Any) -> None:
    """What Python has seen to before, the operator sees to for memory's sake."""
    tensors = grouped_cases.inputs(Case((3, 4), 8, 2))
    rest = (tensors["down_weight"], None, tensors["up_weight"], *[None] * 5)
    options = (1.0, 1e-5, 0.0, 0.0, 1, DTYPE_CODES[FP32], DTYPE_CODES[FP32], False, False)
    for index in (torch.zeros(5).long(), torch.zeros(3).int()):
        with device.simulate(80), pytest.raises(RuntimeError, match="index: expected a contiguous"):
            simulated.grouped_forward(tensors["x"], None, *rest, index, *options)

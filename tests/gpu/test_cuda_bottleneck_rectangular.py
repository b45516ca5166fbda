"""The CUDA bottleneck with D_in other than D_out and input dropout, and backward's ways."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import bottleneck_cases
import cuda_backend
import device
import pytest
import torch
from bottleneck_cases import LORA, Case
from compare import check_all
from schedules import check_schedules
from torch import Tensor

from fastadapters.ops.codes import DTYPE_CODES

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason=device.TOOLS),
    pytest.mark.usefixtures("simulated"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHITECTURES = pytest.mark.parametrize("arch", cuda_backend.ARCHITECTURES, ids="sm_{}".format)

CASES = [
    replace(case, dtype=dtype)
    for dtype in (BF16, FP16, FP32)
    for case in [
        replace(LORA, d=72, d_out=200, input_dropout=0.2),
        replace(LORA, rows=(70,), d=200, d_out=72, r=40, scale="learnable"),
        Case(rows=(1,), d=100, d_out=7, r=3, residual="none", scale="channel"),
        Case(rows=(5, 15), d=7, d_out=130, r=70, residual="none", dropout=0.3, input_dropout=0.5),
        Case(rows=(70,), d=130, d_out=64, residual="none", norm="both", activation="silu"),
        Case(rows=(70,), d=96, residual="x", input_dropout=0.3, activation="gelu"),
        Case(rows=(70,), d=130, r=20, norm="both", input_dropout=0.3, activation="gelu"),
        Case(
            rows=(65,), d=136, d_out=200, r=70, residual="none", norm="weight", dropout=0.2,
            input_dropout=0.1, activation="silu",
        ),
        Case(rows=(9,), d=40, d_out=24, residual="none", input_dropout=1.0),
    ]
]  # fmt: skip
MIXED = [
    replace(LORA, d=72, d_out=200, dtype=BF16, x_dtype=FP32, input_dropout=0.2),
    replace(LORA, d=200, d_out=72, dtype=FP16, residual_dtype=FP32, input_dropout=0.2),
    Case(
        rows=(70,), d=136, dtype=BF16, x_dtype=FP32, norm="both", input_dropout=0.3,
        activation="gelu",
    ),
]  # fmt: skip
ACCUMULATED = [
    (80, replace(LORA, rows=(330,), d=200, d_out=72, dtype=BF16, input_dropout=0.2)),
    (80, replace(LORA, rows=(330,), d=72, d_out=130, r=10, dtype=FP16, layout="slice")),
    (89, Case(rows=(300,), d=1024, r=8, dtype=BF16, activation="gelu")),
]
# So many rows that the x and dy of all are more than the L2 cache has, those of 512 rows are not.
SHARES = [
    Case(rows=(600,), d=512, r=40, dtype=BF16, scale="learnable", dropout=0.3, activation="gelu"),
    Case(rows=(600,), d=500, r=40, dtype=FP16, norm="both", input_dropout=0.2, activation="silu"),
    Case(rows=(6, 100), d=340, r=72, dtype=BF16, x_dtype=FP32, residual="other", layout="slice"),
    Case(rows=(600,), d=256, r=40, norm="both", activation="silu"),
]
# So wide that the rows under way are more than the L2 cache of the machine's four processors has.
COLUMNS = [
    Case(rows=(150,), d=1500, r=33, dtype=BF16, activation="gelu", scale="learnable"),
    Case(rows=(70,), d=1528, r=16, dtype=FP16, dropout=0.3, up_bias=False, scale="channel"),
]


@pytest.mark.parametrize("case", [*CASES, *MIXED], ids=str)
def test_matches_reference(case: Case) -> None:
    """Both ways, in all dtypes; the masks are those of the reference."""
    check_schedules(case, "cuda", 80)


@pytest.mark.parametrize(("arch", "case"), ACCUMULATED, ids=str)
def test_accumulates(arch: int, case: Case) -> None:
    check_schedules(case, "cuda", arch)
    with device.simulate(arch) as run:
        bottleneck_cases.run(case, bottleneck_cases.inputs(case), "cuda")
    assert sum("ELb1ELb1E" in report.name for report in run.launches) == 1


@pytest.mark.parametrize("case", COLUMNS, ids=str)
def test_by_columns(case: Case) -> None:
    check_schedules(case, "cuda", 90)
    with device.simulate(90) as run:
        bottleneck_cases.run(case, bottleneck_cases.inputs(case), "cuda")
    assert sum("column_pass" in report.name for report in run.launches) == 1


@ARCHITECTURES
@pytest.mark.parametrize("input_dropout", [0.0, 0.05])
@pytest.mark.parametrize(("d_in", "d_out"), [(256, 704), (704, 256)])
def test_traffic(d_in: int, d_out: int, input_dropout: float, arch: int, simulated: Any) -> None:
    """Each of x, residual, y and dx moves once each way it does; dy once more for dWu."""
    m, r = 128, 40
    gen = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen).to(BF16)

    x, residual, dy = randn(m, d_in), randn(m, d_out), randn(m, d_out)
    down, up, seed = randn(r, d_in) / 8, randn(d_out, r) / 8, torch.tensor([5, -1])
    codes = DTYPE_CODES[BF16], DTYPE_CODES[BF16]
    weights = (down, None, up, *[None] * 4, seed, 2.0, 1e-5, 0.0, input_dropout, 0, *codes, False)
    with device.simulate(arch) as run:
        y, z, stats = simulated.bottleneck_forward(x, residual, *weights, True)
        dx, *_ = simulated.bottleneck_backward(dy, x, z, stats, *weights, 0b1011)
    forward, backward, gradients, _ = run.launches
    for report, tensors_in, out in (
        (forward, (x, residual, down, up), y),
        (backward, (dy, z, down, up), dx),
        (gradients, (x, dy), None),
    ):
        for t in tensors_in:
            weight = t is down or t is up
            traffic = report.traffic(t)
            assert traffic.read == (2 if weight else 1) * t.nbytes
            assert weight or t is z or traffic.partial_read_lines == 0
        if out is not None:
            traffic = report.traffic(out)
            assert traffic.written == traffic.written_unique == out.nbytes
            assert traffic.partial_written_lines == 0
        assert report.conflict_ratio == 1.0
    assert backward.traffic(x).read == 0 and backward.traffic().written == dx.nbytes + m * 48 * 2
    assert gradients.traffic(z).read == d_out // 64 * z.nbytes


def bare(m: int, d: int, r: int, add_x: bool) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """x, dy and the operators' other arguments of a square LoRA in bfloat16."""
    gen = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(m, d, generator=gen).to(BF16) for _ in range(2))
    down, up = (torch.randn(*shape, generator=gen).to(BF16) / 8 for shape in ((r, d), (d, r)))
    codes = DTYPE_CODES[BF16], DTYPE_CODES[BF16]
    return x, dy, (down, None, up, *[None] * 5, 2.0, 1e-5, 0.0, 0.0, 1, *codes, add_x)


@ARCHITECTURES
def test_traffic_by_columns(arch: int, simulated: Any) -> None:
    """The data pass reads dy and makes dz; then x and dy come in and dx goes out, once."""
    x, dy, weights = bare(128, 1536, 64, add_x=True)
    with device.simulate(arch) as run:
        _, z, stats = simulated.bottleneck_forward(x, None, *weights, True)
        dx, *_ = simulated.bottleneck_backward(dy, x, z, stats, *weights, 0b1011)
    _, backward, columns, _ = run.launches
    assert backward.traffic(dy).read == dy.nbytes and backward.traffic(x).read == 0
    assert backward.traffic().written == z.nbytes and columns.traffic(z).read == 24 * z.nbytes
    assert columns.traffic(x).read == columns.traffic(dy).read == dy.nbytes
    assert columns.traffic(dx).written == columns.traffic(dx).written_unique == dx.nbytes
    for report in (backward, columns):
        assert report.conflict_ratio == 1.0 and report.count("mma.sync") > 0
        for t in (x, dy, dx):
            traffic = report.traffic(t)
            assert traffic.partial_read_lines == traffic.partial_written_lines == 0


@pytest.mark.parametrize("case", SHARES, ids=str)
def test_in_shares(case: Case) -> None:
    """On a memory so slow that it pays: where dy is in the cache for the weight pass, and x."""
    with device.simulate(89) as run:
        bottleneck_cases.check_backend(case, "cuda")
    passes = [r for r in run.launches if "_pass" in r.name]
    assert [r.grid[0] for r in passes if "ELb1E" in r.name] == [5, 5]
    assert len(passes) == 1 + (2 + (case.x_dtype is not None)) * 2


def test_in_one_share_where_memory_is_fast() -> None:
    case = SHARES[0]
    with device.simulate(90) as run:
        bottleneck_cases.run(case, bottleneck_cases.inputs(case), "cuda")
    assert [r.grid[0] for r in run.launches if "data_pass" in r.name] == [10, 10]


def test_shares_and_splits_add_up() -> None:
    """Each share's splits add to those of the shares before."""
    case = Case(rows=(1600,), d=256, r=40, dtype=BF16, norm="both", activation="silu")
    wanted = {"needs": lambda name: name == "down_weight"}
    tensors = bottleneck_cases.inputs(case)
    with device.simulate(89) as run:
        out = bottleneck_cases.run(case, tensors, "cuda", **wanted)
    check_all(out, bottleneck_cases.reference_pair(case, tensors, **wanted))
    assert [r.grid[:2] for r in run.launches if "weight_pass" in r.name] == [(4, 2)] * 2


def test_traffic_in_shares(simulated: Any) -> None:
    """All that is read and written is so as often as without."""
    x, dy, weights = bare(600, 512, 64, add_x=False)
    with device.simulate(89) as run:
        _, z, stats = simulated.bottleneck_forward(x, dy, *weights, True)
        dx, *_ = simulated.bottleneck_backward(dy, x, z, stats, *weights, 0b1011)
    _, *passes, _ = run.launches
    backward, gradients = (sum(passes[i::2], device.Report()) for i in range(2))
    assert len(passes) == 4
    assert backward.traffic(dy).read == gradients.traffic(dy).read == dy.nbytes
    assert gradients.traffic(x).read == x.nbytes and backward.traffic(x).read == 0
    assert backward.traffic(z).read == z.nbytes and gradients.traffic(z).read == 8 * z.nbytes
    assert backward.traffic().written == dx.nbytes + z.nbytes
    assert gradients.conflict_ratio == 1.0

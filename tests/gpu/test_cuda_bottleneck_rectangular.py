"""The CUDA bottleneck with D_in other than D_out, input dropout, and by columns: PTX machine."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import bottleneck_cases
import cuda_backend
import device
import pytest
import torch
from bottleneck_cases import Case
from schedules import check_schedules

from fastadapters import backends, ops
from fastadapters.ops.codes import DTYPE_CODES

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason=device.TOOLS)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHITECTURES = pytest.mark.parametrize("arch", cuda_backend.ARCHITECTURES, ids="sm_{}".format)


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend's operators are those on the machine, which take CPU tensors."""
    operators = cuda_backend.load()
    monkeypatch.setitem(ops.NAMESPACES, "cuda", operators)
    monkeypatch.setattr(backends, "_why_not", lambda *args: None)
    return operators


LORA = Case(residual="other", activation="identity", down_bias=False, up_bias=False)
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
    replace(LORA, rows=(330,), d=200, d_out=72, dtype=BF16, input_dropout=0.2),
    replace(LORA, rows=(330,), d=72, d_out=130, r=10, dtype=FP16, layout="slice"),
]
# So wide that the rows under way are more than the L2 cache of the machine's four processors has.
COLUMNS = [
    Case(rows=(150,), d=1500, r=33, dtype=BF16, activation="gelu", scale="learnable"),
    Case(rows=(70,), d=1528, r=10, dtype=FP16, dropout=0.3, up_bias=False, scale="channel"),
]


@pytest.mark.parametrize("case", [*CASES, *MIXED], ids=str)
def test_matches_reference(case: Case) -> None:
    """Both ways, in all dtypes; the masks are those of the reference."""
    check_schedules(case, "cuda", 80)


@pytest.mark.parametrize("case", ACCUMULATED, ids=str)
def test_accumulates(case: Case) -> None:
    check_schedules(case, "cuda", 80)
    with device.simulate(80) as run:
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
    assert backward.traffic(x).read == gradients.traffic(z).read == 0


@ARCHITECTURES
def test_traffic_by_columns(arch: int, simulated: Any) -> None:
    """The data pass reads dy and makes dz; then x and dy come in and dx goes out, once."""
    m, d, r = 128, 1536, 64
    gen = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(m, d, generator=gen).to(BF16) for _ in range(2))
    down, up = (torch.randn(*shape, generator=gen).to(BF16) / 8 for shape in ((r, d), (d, r)))
    codes = DTYPE_CODES[BF16], DTYPE_CODES[BF16]
    weights = (down, None, up, *[None] * 5, 2.0, 1e-5, 0.0, 0.0, 1, *codes, True)
    with device.simulate(arch) as run:
        _, z, stats = simulated.bottleneck_forward(x, None, *weights, True)
        dx, *_ = simulated.bottleneck_backward(dy, x, z, stats, *weights, 0b1011)
    _, backward, columns, _ = run.launches
    assert backward.traffic(dy).read == dy.nbytes and backward.traffic(x).read == 0
    assert backward.traffic(dx).written == 0
    assert columns.traffic(x).read == columns.traffic(dy).read == dy.nbytes
    assert columns.traffic(dx).written == columns.traffic(dx).written_unique == dx.nbytes
    for report in (backward, columns):
        assert report.conflict_ratio == 1.0 and report.count("mma.sync") > 0
        for t in (x, dy, dx):
            traffic = report.traffic(t)
            assert traffic.partial_read_lines == traffic.partial_written_lines == 0

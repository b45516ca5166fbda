"""The Triton kernels as compiled for sm_80 and sm_90, run on the PTX machine through the op."""

from __future__ import annotations

from dataclasses import replace

import bottleneck_cases
import device
import pytest
import torch
from bottleneck_cases import Case, mixed_cases, option_cases, rectangular_cases
from compare import check_all
from schedules import check_schedules
from torch import Tensor

from fastadapters import backends

pytest.importorskip("triton")
from fastadapters.kernels.bottleneck import ops as kernels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHITECTURES = pytest.mark.parametrize("arch", [80, 90], ids="sm_{}".format)


@pytest.fixture(autouse=True)
def on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine runs kernels on CPU tensors, which the backend itself refuses."""
    monkeypatch.setattr(backends, "_why_not", lambda *args: None)


# Every option in bf16; the other dtypes, sizes and layouts where the code they compile to differs.
OTHERS = [
    Case(rows=(70,), dtype=FP16, norm="both", activation="gelu", dropout=0.3),
    Case(rows=(70,), dtype=FP16, param_dtype=FP32, scale="channel", residual="other"),
    Case(rows=(70,), dtype=FP32, norm="both", activation="silu", scale="learnable", dropout=0.3),
    Case(rows=(70,), dtype=FP32, activation="gelu", residual="other"),
    Case(rows=(130,), d=256, r=64, dtype=BF16, param_dtype=FP32, activation="gelu", norm="both"),
    Case(rows=(70,), d=200, r=128, dtype=BF16, activation="silu", scale="channel", dropout=0.3),
    Case(rows=(40,), d=200, r=300, dtype=BF16, activation="silu", norm="both", dropout=0.3),
]
SHAPES = [
    Case(rows=rows, d=d, r=r, dtype=BF16, activation="silu", norm=norm)
    for rows, d, r, norm in [
        ((0,), 64, 8, "none"),
        ((1,), 1, 1, "both"),
        ((5,), 7, 3, "none"),
        ((63,), 768, 10, "none"),
        ((65,), 100, 48, "both"),
        ((2, 3, 33), 130, 33, "none"),
    ]
]


@pytest.mark.parametrize("case", [*option_cases(dtype=BF16), *OTHERS], ids=str)
def test_matches_reference(case: Case) -> None:
    check_schedules(case, "triton", 80)


# Every combination of dtypes of x and y; on Hopper the half of them with an fp32 x and y.
MIXED = mixed_cases(BF16, rows=(70,))
MIXED += [mixed_cases(FP16, rows=(70,), r=20)[i] for i in (1, 5, 6)]


@pytest.mark.parametrize("case", MIXED, ids=str)
def test_mixed_precision(case: Case) -> None:
    out = check_schedules(case, "triton", 80)
    assert out["y"].dtype == case.out_dtype and out["d_x"].dtype == (case.x_dtype or case.dtype)


@pytest.mark.parametrize("case", MIXED[1:8:2], ids=str)
def test_mixed_precision_on_hopper(case: Case) -> None:
    check_schedules(case, "triton", 90)


# On Hopper the products differ, and what feeds them: LayerNorm, scales, layouts, chunks of r.
@pytest.mark.parametrize("case", [*option_cases(dtype=BF16)[::3], *OTHERS], ids=str)
def test_matches_reference_on_hopper(case: Case) -> None:
    check_schedules(case, "triton", 90)


LORA, _, EVERYTHING, *_ = rectangular_cases(rows=(70,), dtype=BF16)


@pytest.mark.parametrize(
    ("case", "arch"),
    [
        (LORA, 80),
        (replace(EVERYTHING, dtype=FP32), 80),
        (replace(EVERYTHING, x_dtype=FP32, param_dtype=FP32, residual_dtype=FP32), 80),
        (EVERYTHING, 90),
    ],
    ids=str,
)
def test_rectangular(case: Case, arch: int) -> None:
    check_schedules(case, "triton", arch)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_ragged_shapes(case: Case) -> None:
    check_schedules(case, "triton", 80)


@ARCHITECTURES
def test_tf32_where_the_precision_setting_allows_it(arch: int) -> None:
    case = Case(rows=(70,), d=96, r=32, residual="none")
    tensors = bottleneck_cases.inputs(case)
    gold, _ = bottleneck_cases.reference_pair(case, tensors)(0)
    torch.set_float32_matmul_precision("high")
    try:
        with device.simulate(arch) as run:
            out = bottleneck_cases.run(case, tensors, "triton")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert run.total("forward_kernel").count("mma.sync") > 0
    error = (out["y"] - gold["y"]).square().mean().sqrt() / gold["y"].square().mean().sqrt()
    assert 2**-13 < error < 2**-9  # operands of 10 explicit bits, the rest cut off


@ARCHITECTURES
def test_same_bits_whatever_the_schedule(arch: int) -> None:
    case = Case(rows=(300,), d=96, r=16, dtype=BF16, norm="both", scale="learnable", dropout=0.3)
    tensors = bottleneck_cases.inputs(case)
    runs = []
    for seed in range(3):
        with device.simulate(arch, seed) as run:
            runs.append(bottleneck_cases.run(case, tensors, "triton"))
    (weights,) = (report for report in run.launches if report.name == "weights_kernel")
    assert weights.grid[2] > 1  # several splits
    for other in runs[1:]:
        for name, t in runs[0].items():
            assert torch.equal(t, other[name]), name


def compiled() -> int:
    """How many kernels have been compiled for sm_80."""
    names = ("forward_kernel", "backward_kernel", "weights_kernel", "reduce_kernel")
    return sum(len(getattr(kernels, name).device_caches[80][0]) for name in names)


def test_batch_size_is_no_reason_to_compile() -> None:
    case = Case(d=64, r=8, dtype=BF16, dropout=0.3)
    counts = []
    for rows in (1, 2, 16, 129, 500):
        with device.simulate(80):
            tensors = bottleneck_cases.inputs(replace(case, rows=(rows,)))
            bottleneck_cases.run(case, tensors, "triton")
        counts.append(compiled())
    assert counts[1:] == counts[:-1]


@pytest.mark.parametrize(
    ("wanted", "ran"),
    [
        ("", "forward"),
        ("x", "norm forward norm backward"),
        ("x down_weight", "norm forward norm backward weights reduce"),
        ("down_bias", "norm forward norm backward weights reduce"),
        ("norm_weight", "norm forward norm backward weights reduce"),
        ("norm_bias", "norm forward norm backward weights reduce"),
        ("up_weight", "norm forward norm backward weights reduce"),
        ("up_bias", "norm forward weights reduce"),
        ("scale", "norm forward norm backward weights reduce"),
    ],
)
def test_only_what_is_asked_for(wanted: str, ran: str) -> None:
    case = Case(rows=(70,), dtype=BF16, norm="both", activation="gelu", scale="learnable")
    tensors = bottleneck_cases.inputs(case)
    names = wanted.split()

    def needs(name: str) -> bool:
        return name in names

    with device.simulate(80) as run:
        out = bottleneck_cases.run(case, tensors, "triton", needs=needs)
    assert out.keys() == {"y", *(f"d_{name}" for name in names)}
    check_all(out, bottleneck_cases.reference_pair(case, tensors, needs=needs))
    launched = [report.name.removesuffix("_kernel") for report in run.launches]
    assert launched == (ran.split() if names else ["norm", "forward"])


@pytest.mark.parametrize("name", ["x", "up_weight"])
def test_saves_no_x_that_nothing_reads(name: str) -> None:
    case = Case(rows=(70,), r=10, dtype=BF16, activation="gelu", dropout=0.3)
    tensors = bottleneck_cases.inputs(case)
    wanted = {"needs": lambda n: n == name}
    with device.simulate(80), bottleneck_cases.saving() as saved:
        out = bottleneck_cases.run(case, tensors, "triton", **wanted)
    check_all(out, bottleneck_cases.reference_pair(case, tensors, **wanted))
    assert tensors["x"].data_ptr() not in saved


def traffic(
    arch: int, d: int, **dtypes: torch.dtype
) -> tuple[device.Simulation, dict[str, Tensor]]:
    """A training step at M = 256, r = 64 in bf16, and its tensors."""
    with device.simulate(arch) as run:
        case = Case(rows=(256,), d=d, r=64, dtype=BF16, activation="gelu", **dtypes)
        tensors = {name: t.clone() for name, t in bottleneck_cases.inputs(case).items()}
        out = bottleneck_cases.run(case, tensors, "triton")
    return run, tensors | out


@ARCHITECTURES
@pytest.mark.parametrize(
    ("d", "dtypes"),
    [(768, {}), (1024, {}), (768, {"x_dtype": FP32, "param_dtype": FP32})],
    ids=["768", "1024", "fp32 storage"],
)
def test_traffic(arch: int, d: int, dtypes: dict[str, torch.dtype]) -> None:
    """In units of x [M, D]. What is read twice comes from L2 the second time."""
    run, t = traffic(arch, d, **dtypes)
    assert t["x"].dtype == t["y"].dtype == t["d_x"].dtype == dtypes.get("x_dtype", BF16)
    launched = [report.name.removesuffix("_kernel") for report in run.launches]
    assert launched == ["forward", "backward", "weights", "reduce"]  # and no kernel that casts
    unit = t["x"].nbytes
    forward, backward, weights = (
        run.total(f"{n}_kernel") for n in ("forward", "backward", "weights")
    )

    moved = forward.traffic(t["x"])
    assert moved.read == moved.read_sectors == 2 * unit and moved.partial_read_lines == 0
    moved = forward.traffic(t["y"])
    assert moved.written == moved.written_sectors == unit and moved.partial_written_lines == 0
    for name in ("down_weight", "up_weight"):
        assert forward.traffic(t[name]).read == forward.grid[0] * t[name].nbytes

    # z stands for x: what the forward wrote is read once by backward, and nothing else is.
    assert backward.traffic(t["x"]).read == 0
    z = [
        k for k in forward.by_address if k in backward.by_address and forward.by_address[k].written
    ]
    moved = [(forward.by_address[k].written, backward.by_address[k].read) for k in z]
    assert moved == [(256 * 64 * 2, 256 * 64 * 2)]
    assert backward.traffic(t["cotangent"]).read == 2 * unit
    moved = backward.traffic(t["d_x"])
    assert moved.written == moved.written_sectors == unit and moved.partial_written_lines == 0

    assert weights.traffic(t["x"]).read == weights.traffic(t["cotangent"]).read == unit
    # fp32 weights reach the products by a layout of the compiler's own choice.
    limit = 1.25 if dtypes else 1.0
    assert max(forward.conflict_ratio, backward.conflict_ratio) <= limit
    matrix = "wgmma" if arch == 90 else "mma.sync"
    assert all(kernel.count(matrix) > 0 for kernel in (forward, backward, weights))


def test_relu_keeps_h() -> None:
    """Backward leaves dx and dz alone, but where h is not as wide as the blocks of r."""
    for r, copies in ((64, 1), (48, 2)):
        case = Case(rows=(128,), d=256, r=r, dtype=BF16, dropout=0.3)
        with device.simulate(80) as run:
            bottleneck_cases.check_backend(case, "triton")
        written = run.total("backward_kernel").traffic().written
        assert written == 128 * 256 * 2 + copies * 128 * 64 * 2


def test_traffic_of_lora() -> None:
    """x, residual, y, dy and dx as often as without dropout in front: the mask is never stored."""
    case = Case(
        rows=(128,), d=256, d_out=768, r=16, dtype=BF16, activation="identity", down_bias=False,
        up_bias=False, residual="other", input_dropout=0.05,
    )  # fmt: skip
    with device.simulate(80) as run:
        t = {name: tensor.clone() for name, tensor in bottleneck_cases.inputs(case).items()}
        t |= bottleneck_cases.run(case, t, "triton")
    launched = [report.name.removesuffix("_kernel") for report in run.launches]
    assert launched == ["forward", "backward", "weights", "reduce"]
    forward, backward, weights = (
        run.total(f"{n}_kernel") for n in ("forward", "backward", "weights")
    )
    for kernel, names in (
        (forward, ("x", "residual")), (backward, ("cotangent",)), (weights, ("x", "cotangent")),
    ):  # fmt: skip
        for name in names:
            assert kernel.traffic(t[name]).read == t[name].nbytes, name
    for kernel, name in ((forward, "y"), (backward, "d_x")):
        moved = kernel.traffic(t[name])
        assert moved.written == moved.written_sectors == t[name].nbytes, name
    assert backward.traffic(t["x"]).read == 0

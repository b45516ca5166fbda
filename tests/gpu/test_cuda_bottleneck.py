"""The CUDA kernels as compiled for sm_80 and sm_90, run on the PTX machine through the op."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import bottleneck_cases
import cuda_backend
import device
import pytest
import test_multiway
import torch
from bottleneck_cases import Case, check_backend, mixed_cases, option_cases
from compare import check_all
from schedules import check_schedules, not_caught
from torch import Tensor

from fastadapters.cuda_limits import cuda_fits
from fastadapters.ops.codes import DTYPE_CODES

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason=device.TOOLS),
    pytest.mark.usefixtures("simulated"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHITECTURES = pytest.mark.parametrize("arch", cuda_backend.ARCHITECTURES, ids="sm_{}".format)


# Every option and dtype; smooth activations where LayerNorm is folded into the weights, because one
# z on the other side of relu's kink would decide the largest error.
OPTIONS = [case for dtype in (BF16, FP16, FP32) for case in option_cases(dtype=dtype)]
SHAPES = [
    Case(rows=rows, d=d, r=r, dtype=dtype, activation="silu", norm=norm)
    for dtype in (BF16, FP16, FP32)
    for norm in ("none", "both")
    for rows, d, r in [
        ((0,), 64, 8),
        ((1,), 1, 1),
        ((1,), 100, 33),
        ((5,), 7, 3),
        ((2, 3, 33), 130, 64),
        ((70,), 256, 256),
        ((65,), 768, 48),
    ]
]
LAYOUTS = [
    Case(rows=(70,), d=72, r=24, dtype=BF16, param_dtype=FP32, scale="channel", norm="both"),
    Case(rows=(2, 40), d=72, r=24, dtype=FP32, param_dtype=BF16, scale="learnable"),
    Case(rows=(5, 7, 9), d=72, dtype=BF16, layout="transposed", residual="other"),
    Case(rows=(3, 30), d=50, dtype=FP16, layout="slice", cotangent="expanded"),
    Case(rows=(66,), d=64, r=512, dtype=BF16, activation="gelu", dropout=0.2),
    # h kept in the place of z, in rows that start on 16 bytes or do not, of several parts of r.
    Case(rows=(70,), d=72, r=20, dtype=FP16, activation="identity", dropout=0.3),
    Case(rows=(70,), d=72, r=70, dtype=BF16, dropout=0.3),
    Case(rows=(70,), d=72, r=72, dtype=FP32, dropout=0.3),
]


MIXED = [
    *(
        replace(case, activation="silu") if case.norm != "none" else case
        for dtype in (BF16, FP16)
        for case in mixed_cases(dtype)
    ),
    Case(
        (70,), 130, 70, dtype=BF16, x_dtype=FP32, norm="both", scale="learnable", activation="silu"
    ),
    Case(rows=(5,), d=7, r=3, dtype=FP16, x_dtype=FP32, activation="silu"),
    Case(rows=(0,), d=64, r=8, dtype=BF16, x_dtype=FP32),
]


# Rows enough for the data pass to accumulate dWu on four processors, which the last does not.
ACCUMULATED = [
    Case(rows=(330,), d=200, r=16, dtype=BF16, activation="gelu", scale="learnable", dropout=0.3),
    Case(rows=(3, 200), d=100, r=24, dtype=BF16, residual="none", layout="slice", scale="channel"),
    Case((330,), d=130, r=3, dtype=FP16, residual="other", cotangent="expanded", dropout=0.2),
    Case(rows=(200,), d=72, r=10, dtype=BF16, x_dtype=FP32, activation="silu"),
    Case(rows=(330,), d=72, r=10, dtype=FP16, x_dtype=FP32, residual="none"),
    Case(rows=(200,), d=72, r=10, dtype=BF16, residual="other", residual_dtype=FP32),
    Case(rows=(330,), d=200, r=16, dtype=BF16, norm="both", activation="gelu"),
]


@ARCHITECTURES
@pytest.mark.parametrize("case", ACCUMULATED, ids=str)
def test_accumulates(case: Case, arch: int) -> None:
    check_schedules(case, "cuda", arch)
    tensors = bottleneck_cases.inputs(case)
    with device.simulate(arch) as run:
        bottleneck_cases.run(case, tensors, "cuda")
    accumulating = sum("ELb1ELb1E" in report.name for report in run.launches)
    assert accumulating == (case.norm == "none")


@ARCHITECTURES
@pytest.mark.parametrize("case", [*OPTIONS, *SHAPES, *LAYOUTS], ids=str)
def test_matches_reference(case: Case, arch: int) -> None:
    check_schedules(case, "cuda", arch)


@pytest.mark.parametrize("case", MIXED, ids=str)
def test_mixed_precision(case: Case) -> None:
    """x or y in fp32 around 16-bit products."""
    check_schedules(case, "cuda", 80)


@pytest.mark.parametrize(
    ("dtype", "x_dtype"), [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32)], ids=str
)
def test_layer_norm_far_from_zero(dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    """Folded LayerNorm is as accurate as the reference when the mean dwarfs the deviation."""
    wide = None if x_dtype == dtype else x_dtype
    case = Case(rows=(70,), d=200, r=40, dtype=dtype, x_dtype=wide, activation="gelu", norm="both")
    tensors = bottleneck_cases.inputs(case)
    tensors["x"] = (tensors["x"].float() + 20).to(x_dtype)
    with device.simulate(80):
        out = bottleneck_cases.run(case, tensors, "cuda")
    check_all(out, bottleneck_cases.reference_pair(case, tensors))


@pytest.mark.parametrize(("residual", "dropout"), [("x", 0.0), ("other", 0.2)])
def test_multiway_writes_slices(residual: str, dropout: float) -> None:
    """Both adapters of the two-modality op fill their slices of one y and one dx."""
    with device.simulate(80) as run:
        test_multiway.test_is_two_bottlenecks("cuda", BF16, 17, residual, dropout)
    assert len([r for r in run.launches if "data_pass" in r.name]) == 4


def to_tf32(t: Tensor) -> Tensor:
    """fp32 rounded to TF32's 10 bits, ties away from zero."""
    bits = t.detach().float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("norm", ["none", "both"])
@pytest.mark.parametrize("r", [10, 64, 80])
def test_tf32(r: int, norm: str, tf32: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyTorch may round fp32 factors to TF32 the kernels do, with the errors of that."""
    linear = torch.nn.functional.linear

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return linear(to_tf32(x), to_tf32(weight))

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            dy, rows = to_tf32(dy), (-1, dy.shape[-1])
            columns = to_tf32(x).reshape(-1, x.shape[-1])
            return dy @ to_tf32(weight), dy.reshape(rows).T @ columns

    def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dtype == torch.float64:
            return linear(x, weight, bias)
        y = Rounded.apply(x, weight)
        return y if bias is None else y + bias

    case = Case(rows=(100,), d=160, r=r, activation="gelu", norm=norm)
    tensors = bottleneck_cases.inputs(case)
    with device.simulate(80) as run:
        out = bottleneck_cases.run(case, tensors, "cuda")
    assert run.total("data_pass").count("mma.sync.aligned.m16n8k8") > 0
    monkeypatch.setattr(torch.nn.functional, "linear", rounded_linear)
    check_all(out, bottleneck_cases.reference_pair(case, tensors))


def test_ieee_by_default() -> None:
    case = Case(rows=(70,), d=96, r=16)
    with device.simulate(80) as run:
        check_backend(case, "cuda")
    assert run.total().count("mma.sync") == 0


ASKED = [("both", n) for n in ("x", "down_weight", "up_weight", "scale", "norm_weight", "up_bias")]
ASKED += [("none", n) for n in ("x", "down_weight", "up_weight", "up_bias")]


@ARCHITECTURES
@pytest.mark.parametrize(("norm", "needs"), ASKED)
def test_computes_only_what_is_asked(norm: str, needs: str, arch: int) -> None:
    """And saves only what this reads: x not for a frozen adapter without LayerNorm.

    For dWu alone relu's h is there already.
    """
    activation = "relu" if norm == "none" else "gelu"
    case = Case((100,), d=192, r=24, dtype=BF16, activation=activation, norm=norm, scale="channel")
    tensors = bottleneck_cases.inputs(case)
    wanted = {"needs": lambda name: name == needs}
    with device.simulate(arch) as run, bottleneck_cases.saving() as saved:
        out = bottleneck_cases.run(case, tensors, "cuda", **wanted)
    reads_x = needs == "down_weight" or (norm == "both" and needs != "up_bias")
    assert (tensors["x"].data_ptr() in saved) == reads_x
    check_all(out, bottleneck_cases.reference_pair(case, tensors, **wanted))
    weights = [r for r in run.launches if "weight_pass" in r.name]
    assert len(weights) == (needs != "x")
    assert all(r.grid[0] == 3 for r in weights)  # chunks of x^T dz or of dy^T h, not both
    if norm == "none":
        passes = sum("data_pass" in r.name for r in run.launches)
        assert passes == 1 + (needs in ("x", "down_weight"))


@ARCHITECTURES
def test_schedules_give_equal_bits(arch: int) -> None:
    case = Case(rows=(200,), d=200, r=40, dtype=BF16, norm="both", scale="learnable", dropout=0.3)
    tensors = bottleneck_cases.inputs(case)
    results = []
    for seed in range(4):
        with device.simulate(arch, seed):
            results.append(bottleneck_cases.run(case, tensors, "cuda"))
    for other in results[1:]:
        for name, t in results[0].items():
            assert torch.equal(other[name], t), name


TRAFFIC = [  # D, dtypes of x and y, whether the residual is x
    (768, BF16, BF16, True),
    (1024, BF16, BF16, True),
    (768, FP32, FP32, True),
    (768, FP32, BF16, False),
    (768, BF16, FP32, False),
]


@ARCHITECTURES
@pytest.mark.parametrize(("d", "x_dtype", "y_dtype", "add_x"), TRAFFIC, ids=str)
def test_traffic(
    d: int, x_dtype: torch.dtype, y_dtype: torch.dtype, add_x: bool, arch: int, simulated: Any
) -> None:
    """x and dy come in once, and again what shared memory has not kept; y and dx go out once.

    h goes out once and comes in once in the place of x; the data pass leaves nothing but dz to the
    weights' gradients, which read both once for each chunk of columns.
    """
    m, r = 256, 64
    gen = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(m, d, generator=gen).to(dtype) for dtype in (x_dtype, y_dtype))
    down, up = (torch.randn(*shape, generator=gen).to(BF16) / 8 for shape in ((r, d), (d, r)))
    biases = torch.zeros(r, dtype=BF16), torch.zeros(d, dtype=BF16)
    dtypes = DTYPE_CODES[BF16], DTYPE_CODES[y_dtype]
    weights = (down, biases[0], up, biases[1], *[None] * 4, 0.5, 1e-5, 0.0, 0.0, 1, *dtypes, add_x)
    with device.simulate(arch) as run:
        y, z, stats = simulated.bottleneck_forward(x, None, *weights, True)
        dx, *_ = simulated.bottleneck_backward(dy, x, z, stats, *weights, 0b11111)
    forward, backward, *gradients, _ = run.launches
    tiles = m // 64
    for report, tail, out in ((forward, x, y), (backward, dy, dx)):
        again = 0.75 if add_x else 0.0
        assert tail.nbytes <= report.traffic(tail).read <= (1 + again) * tail.nbytes
        assert report.traffic(out).written == report.traffic(out).written_unique == out.nbytes
        for t in (x, dy, y, dx):
            traffic = report.traffic(t)
            assert traffic.partial_read_lines == traffic.partial_written_lines == 0
        assert report.traffic(up).read == tiles * up.nbytes
        assert report.traffic(down).read == tiles * down.nbytes
        assert report.conflict_ratio == 1.0
        assert report.count("mma.sync") > 0
    assert z.shape == (m, r) and z.dtype == BF16 and z.ge(0).all() and z.gt(0).any()
    assert forward.traffic(z).written == forward.traffic(z).written_unique == z.nbytes
    assert backward.traffic(z).read == z.nbytes and backward.traffic(x).read == 0
    assert backward.traffic().written == dx.nbytes + z.nbytes
    assert sum(g.traffic(z).read for g in gradients) == d // 64 * z.nbytes
    assert sum(g.traffic(x).read for g in gradients) == x.nbytes
    assert sum(g.traffic(dy).read for g in gradients) == dy.nbytes
    assert all(g.conflict_ratio == 1.0 for g in gradients)


@ARCHITECTURES
@pytest.mark.parametrize("add_x", [True, False])
def test_traffic_where_the_data_pass_accumulates(add_x: bool, arch: int, simulated: Any) -> None:
    """x and dy are read once in all, but for the dy that shared memory has not kept for dx."""
    m, d, r = 320, 768, 16
    gen = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(m, d, generator=gen).to(BF16) for _ in range(2))
    down, up = (torch.randn(*shape, generator=gen).to(BF16) / 8 for shape in ((r, d), (d, r)))
    options = 0.5, 1e-5, 0.0, 0.0, 1, DTYPE_CODES[BF16], DTYPE_CODES[BF16], add_x
    weights = (down, None, up, up[:, 0].contiguous(), *[None] * 4, *options)
    with device.simulate(arch) as run:
        _, z, stats = simulated.bottleneck_forward(x, None, *weights, True)
        dx, *_ = simulated.bottleneck_backward(dy, x, z, stats, *weights, 0b11111)
    _, backward, gradients, _ = run.launches
    again = 0.5 if add_x and arch == 80 else 0.0
    assert dy.nbytes <= backward.traffic(dy).read <= (1 + again) * dy.nbytes
    assert backward.traffic(z).read == z.nbytes
    assert backward.traffic(dx).written == backward.traffic(dx).written_unique == dx.nbytes
    assert gradients.traffic(x).read == x.nbytes
    assert backward.traffic(x).read == gradients.traffic(dy).read == gradients.traffic(z).read == 0
    assert backward.conflict_ratio == gradients.conflict_ratio == 1.0


LIMITS = [
    Case(rows=(5,), d=40, dtype=BF16),
    Case(rows=(5,), d=40, dtype=BF16, norm="both"),
    Case(rows=(5,), d=40, dtype=FP16, x_dtype=FP32, norm="both"),
    Case(rows=(5,), d=40, dtype=BF16, residual="other", residual_dtype=FP32),
    Case(rows=(5,), d=40, dtype=FP32),
]


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("case", LIMITS, ids=str)
def test_largest_r(case: Case, arch: int) -> None:
    """The launchers take what `cuda_fits` says, in forward and backward, and refuse the next."""

    def fits(r: int) -> bool:
        dtypes = (case.dtype, case.x_dtype or case.dtype, case.out_dtype)
        return cuda_fits(r, *dtypes, divmod(arch, 10), norm=case.norm != "none")

    largest = max(r for r in range(0, 4096, 64) if fits(r))
    for r in (largest, largest + 1):
        sample = replace(case, r=r)
        tensors = bottleneck_cases.inputs(sample)
        with device.simulate(arch):
            if fits(r):
                bottleneck_cases.run(sample, tensors, "cuda")
                continue
            with pytest.raises(RuntimeError, match=f"r = {r} is too large.* bytes of shared"):
                bottleneck_cases.run(sample, tensors, "cuda")


def mutated_cases(kernel: str, dtype: torch.dtype) -> list[Case]:
    """Both lookaheads, all barriers of LayerNorm, one chunk of D, a last stage like the first."""
    if kernel == "columns":
        return [Case((190,), d=1480, r=40, dtype=dtype)]
    if kernel == "accumulate":
        return [Case((330,), d=192, r=10, dtype=dtype), Case((330,), d=640, r=10, dtype=dtype)]
    d, wide = (192, 128) if dtype == FP32 else (384, 256)
    base = Case(rows=(200,), d=d, r=40, dtype=dtype, activation="gelu")
    through = "none" if "forward" in kernel else "both"  # in backward it meets x behind LayerNorm
    return [
        replace(base, norm="both"),
        base,
        replace(base, rows=(70,), r=wide),
        replace(base, rows=(70,), d=24, norm="both"),
        replace(base, rows=(70,), d=3 * d // 4, input_dropout=0.3, norm=through),
        # The pass over x that is furthest ahead: of one block, whose shared memory is ample.
        *([replace(base, rows=(70,), r=wide, norm="both")] if kernel == "backward" else []),
    ]


KERNELS = {
    "forward": (BF16, "data_pass.*BFloat16ELi64ELb0ELb0ES2_S2_Lb0E"),
    "backward": (BF16, "data_pass.*BFloat16ELi64ELb1ELb0ES2_S2_Lb0E"),
    "accumulate": (BF16, "data_pass.*BFloat16ELi32ELb1ELb1ES2_S2_"),
    "gradients": (BF16, "weight_pass.*BFloat16ELi64ES2_Lb0E"),
    "columns": (BF16, "column_pass.*BFloat16ELi64E"),
    "forward_fp32": (FP32, "data_passINS0_7Float32ILb0EEELi64ELb0ELb0E.*Lb0E"),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_synchronisation_is_needed(kernel: str) -> None:
    """With any one barrier, commit or wait deleted, the machine finds a fault."""
    dtype, pattern = KERNELS[kernel]
    name = next(n for n in device.cuda_kernels() if re.search(pattern, n))
    cases = mutated_cases(kernel, dtype)
    samples = [(case, bottleneck_cases.inputs(case)) for case in cases]
    arch = 89 if kernel == "accumulate" else 80  # so that there is little room

    def is_caught(changed: dict[str, str]) -> bool:
        for seed, (case, tensors) in itertools.product(range(4), samples):
            try:
                with device.simulate(arch, seed, changed):
                    bottleneck_cases.run(
                        case, tensors, "cuda", needs=lambda name: "forward" not in kernel
                    )
            except device.Fault:
                return True
        return False

    assert not_caught(80, name, is_caught) == []

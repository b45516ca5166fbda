"""The CUDA kernels of sequence fusion, compiled for sm_80 and sm_90, on the PTX machine."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import cuda_backend
import device
import pytest
import sequence_fusion_cases as cases
import torch
from compare import check_all
from schedules import not_caught, same_under_schedules
from sequence_fusion_cases import Case
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason=device.TOOLS),
    pytest.mark.usefixtures("simulated"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHITECTURES = pytest.mark.parametrize("arch", cuda_backend.ARCHITECTURES, ids="sm_{}".format)

# Smooth activations in 16 bits: one z on the other side of relu's kink decides the largest error.
OPTIONS = [
    replace(case, activation="silu" if case.activation == "relu" else case.activation)
    for dtype in (BF16, FP16)
    for case in [*cases.option_cases(dtype=dtype), *cases.shape_cases(dtype=dtype)]
]
OPTIONS += [*cases.option_cases(), *cases.shape_cases()]
MIXED = [*cases.mixed_cases(BF16), *cases.mixed_cases(FP16)]
# Too large for one block an item: several tiles of tokens, of y and of pairs (q, o), and groups of
# each; r in one part of 16, in one of 64 and in two.
LARGE: dict[str, Any] = {"items": 5, "out_len": 18, "dim": 160}
SPLIT = [
    Case((70, 130), (160, 160), (16, 12), rank=2, lengths=True, residual="leading", **LARGE),
    Case((70, 130), (160, 160), (48, 20), residual="leading", **LARGE),
    Case((70, 60), (130, 300), (80, 20), rank=4, feature_rank=2, **LARGE),
]
MOSI = Case((50, 50, 50), (40, 40, 40), (8, 8, 8), items=3, dim=40, residual="leading")
FOOD = Case((70, 130), (320, 320), (16, 16), items=4, out_len=16, dim=320, dtype=BF16)


def check_schedules(case: Case, arch: int) -> None:
    same_under_schedules(
        str(case),
        arch,
        lambda: cases.check_backend(case, "cuda"),
        lambda: cases.run(case, cases.inputs(case), "cuda"),
    )


@pytest.mark.parametrize("case", [*OPTIONS, *MIXED], ids=str)
def test_matches_reference(case: Case) -> None:
    check_schedules(case, 80)


@ARCHITECTURES
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_many_blocks(case: Case, arch: int) -> None:
    """The dtype that multiplies in its own way on sm_80, the other on sm_90."""
    check_schedules(replace(case, dtype=FP32 if arch == 80 else BF16), arch)


@ARCHITECTURES
@pytest.mark.parametrize(
    ("case", "launches"), [(MOSI, (1, 3)), (FOOD, (2, 4)), (SPLIT[2], (2, 4))], ids=str
)
def test_launches(case: Case, launches: tuple[int, int], arch: int) -> None:
    case = replace(case, dtype=BF16)
    tensors = cases.inputs(case)
    with device.simulate(arch) as run:
        cases.run(case, tensors, "cuda", needs=lambda name: False)
        forward = len(run.launches)
        cases.run(case, tensors, "cuda")
    assert (forward, len(run.launches) - 2 * forward) == launches


@ARCHITECTURES
@pytest.mark.parametrize("x_dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("residual", ["none", "leading"])
def test_traffic(residual: str, x_dtype: torch.dtype, arch: int) -> None:
    """x comes in once each way, y and dx go out once, in whole lines; no bank conflicts."""
    case = replace(FOOD, residual=residual, x_dtypes=(x_dtype,) * 2)
    if residual == "leading":
        case = replace(case, out_dtype=x_dtype)
    tensors = cases.inputs(case)
    with device.simulate(arch) as run:
        out = cases.run(case, tensors, "cuda")
    down, fuse, factors, hidden, inputs, reduce = run.launches
    leading = out["y"].nbytes if residual == "leading" else 0
    assert fuse.traffic(out["y"]).written == out["y"].nbytes
    assert fuse.traffic(tensors["x 0"]).read == leading
    assert factors.traffic(tensors["cotangent"]).read == out["y"].nbytes
    for m in range(2):
        x, dx = tensors[f"x {m}"], out[f"d_x {m}"]
        assert down.traffic(x).read == inputs.traffic(x).read == x.nbytes
        assert inputs.traffic(dx).written == inputs.traffic(dx).written_unique == dx.nbytes
        assert hidden.traffic(x).read == 0
        for traffic in (down.traffic(x), inputs.traffic(x), inputs.traffic(dx)):
            assert traffic.partial_read_lines == traffic.partial_written_lines == 0
    for report in run.launches:
        assert report.conflict_ratio == 1.0, report.conflicts()
        assert (report.count("mma.sync") > 0) == (report is not reduce)


GROUPS = ("x", "down_weight", "down_bias", "time_factor", "feature_factor")


@pytest.mark.parametrize("case", [replace(FOOD, items=2), MOSI], ids=str)
def test_computes_only_what_is_asked(case: Case) -> None:
    """Each gradient alone has the bits that it has among all, and what it does not need is left."""
    tensors = cases.inputs(case)
    with device.simulate(80):
        every = cases.run(case, tensors, "cuda")
    for group in GROUPS:
        name = f"{group} 1"
        with device.simulate(80) as run:
            out = cases.run(case, tensors, "cuda", needs=lambda n: n == name)  # noqa: B023
        assert torch.equal(out[f"d_{name}"], every[f"d_{name}"]), name
        expected = {"inputs": group in ("x", "down_weight"), "reduce": group != "x"}
        for kernel, launched in expected.items():
            assert any(re.search(rf"\d{kernel}", r.name) for r in run.launches) == launched, name
        read = sum(r.traffic(tensors["x 1"]).read for r in run.launches[1:])
        assert (read >= tensors["x 1"].nbytes) == (group == "down_weight"), name
        assert not any(r.traffic(tensors["x 0"]).read for r in run.launches[2:]), name
    with device.simulate(80) as run:
        cases.run(case, tensors, "cuda", needs=lambda n: False)
    assert len(run.launches) == 2 - (case is MOSI)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_lengths_are_cuts(dtype: torch.dtype) -> None:
    """To the bit: y and all gradients of an item are those of its tokens that count, alone."""
    counts = (66, 10)
    case = Case((130, 10), (48, 48), (16, 8), items=1, out_len=20, dim=48, residual="leading")
    case = replace(case, dtype=dtype, factor_tokens=(130, 10))
    whole = cases.inputs(case)
    cut = dict(whole)
    for m, count in enumerate(counts):
        cut[f"x {m}"] = whole[f"x {m}"][:, :count]
        whole[f"x {m}"] = whole[f"x {m}"].clone()
        whole[f"x {m}"][:, count:] = torch.nan
    whole["lengths"] = torch.tensor([[count] for count in counts])
    with device.simulate(80):
        out = cases.run(case, whole, "cuda")
        expected = cases.run(replace(case, tokens=counts), cut, "cuda")
    for name, t in expected.items():
        got = out[name]
        if name.startswith("d_x"):
            assert not got[:, t.shape[1] :].any(), name
            got = got[:, : t.shape[1]]
        assert torch.equal(got, t), name


def test_zero_factor() -> None:
    """A factor that is 0 has a gradient all the same: nothing divides by it."""
    case = replace(MOSI, residual="none", rank=2)
    tensors = cases.inputs(case)
    tensors["time_factor 1"].zero_()
    with device.simulate(80):
        out = cases.run(case, tensors, "cuda")
    assert not out["y"].any() and not out["d_x 0"].any() and not out["d_time_factor 2"].any()
    gold = cases.run(case, {n: t.double() for n, t in tensors.items()}, "reference")
    torch.testing.assert_close(
        out["d_time_factor 1"].double(), gold["d_time_factor 1"], rtol=1e-4, atol=1e-5
    )


def test_ieee_by_default() -> None:
    with device.simulate(80) as run:
        cases.check_backend(MOSI, "cuda")
    assert run.total().count("mma.sync") == 0


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def test_tf32(tf32: None) -> None:
    """Where PyTorch may round fp32 factors to TF32's 10 bits the kernels do, with fp16's errors."""
    for case in (MOSI, SPLIT[1]):
        half = replace(case, dtype=FP16)
        reference = cases.reference_pair(half)

        def pair(draw: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            gold, base = reference(draw)  # noqa: B023
            return gold, {name: t.float() for name, t in base.items()}

        tensors = {name: t.half().float() for name, t in cases.inputs(half).items()}
        with device.simulate(80) as run:
            out = cases.run(case, tensors, "cuda")
        assert run.total().count("mma.sync.aligned.m16n8k8") > 0
        check_all(out, pair, str(case))


# Several tiles of everything that is walked over, and more steps than stages; both forms of x, and
# one modality without the barriers that a bias brings.
WALKS = replace(FOOD, dims=(192, 192), dim=40, items=6, x_dtypes=(FP32, BF16))
MIXED_FOOD = replace(FOOD, items=2, dim=40, rank=5, x_dtypes=(FP32, BF16))
KERNELS = {
    "forward": (
        "7forwardINS0_8BFloat16E",
        [replace(MOSI, residual="none", x_dtypes=(BF16, FP32, BF16)), MIXED_FOOD],
    ),
    "down_wide": (
        "down_wideINS0_8BFloat16E",
        [replace(MIXED_FOOD, widths=(80, 80), dims=(256, 256))],
    ),
    "backward": (
        "8backwardINS0_8BFloat16E",
        [
            replace(MOSI, residual="none", rank=3, biases="some"),
            replace(FOOD, dims=(40, 40), dim=80, widths=(40, 20), rank=3, biases="some"),
        ],
    ),
    "inputs": ("6inputsINS0_8BFloat16ELi64E", [replace(WALKS, widths=(80, 20))]),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_synchronisation_is_needed(kernel: str) -> None:
    """With any one barrier, commit or wait deleted, the machine finds a fault."""
    pattern, samples = KERNELS[kernel]
    name = next(n for n in device.cuda_kernels() if re.search(pattern, n))
    drawn = [(replace(c, dtype=BF16), cases.inputs(replace(c, dtype=BF16))) for c in samples]
    forward = kernel in ("forward", "down_wide")

    def is_caught(changed: dict[str, str]) -> bool:
        for seed, (case, tensors) in itertools.product(range(4), drawn):
            try:
                arch = 90 if seed % 2 else 80  # with stages of their own
                with device.simulate(arch, seed, changed):
                    cases.run(case, tensors, "cuda", needs=lambda n: not forward)
            except device.Fault:
                return True
        return False

    assert not_caught(80, name, is_caught) == []

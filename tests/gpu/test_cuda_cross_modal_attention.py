"""The CUDA kernels of cross-modal attention, compiled for sm_80 and sm_90, on the PTX machine."""

from __future__ import annotations

import itertools
import re
import shutil
from typing import Any, NamedTuple

import cuda_backend
import device
import pytest
import torch
from attention_cases import (
    ADDITIVE,
    BIASES,
    INF,
    MASKED,
    NAMES,
    attention_tensors,
    call,
    cotangents,
    numbers,
    reference_pair,
)
from compare import check_all
from schedules import same_under_schedules, unneeded

import fastadapters
from fastadapters import backends, functional, modules, ops
from fastadapters.ops.cross_modal_attention import STATES
from fastadapters.reference.cross_modal_attention import Bias

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason=device.TOOLS)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHITECTURES = pytest.mark.parametrize("arch", cuda_backend.ARCHITECTURES, ids="sm_{}".format)
ITSELF = ((-INF, 0.0), (-INF, 0.0))


class Sample(NamedTuple):
    sizes: tuple[int, ...]  # C, I, B, H, d
    bias: Bias
    dtype: torch.dtype
    per_item: bool = False
    outputs: str = "both"


# Every block of a bias seen and blocked, every width of a kernel in either kind of product, ragged
# sizes, more than two tiles of keys and of queries.
SAMPLES = [
    Sample((150, 1, 5, 1, 32), ADDITIVE, BF16),
    Sample((37, 1, 70, 1, 16), MASKED, FP16),
    Sample((40, 3, 30, 2, 33), BIASES[2], BF16),
    Sample((70, 1, 9, 1, 100), ADDITIVE, BF16),
    Sample((70, 2, 3, 1, 20), ADDITIVE, FP32),
    Sample((50, 1, 9, 1, 128), ADDITIVE, FP32),
    Sample((40, 3, 24, 1, 33), BIASES[2], FP32),
    Sample((35, 3, 3, 1, 16), BIASES[3], FP32, per_item=True),
    Sample((70, 1, 2, 1, 24), ADDITIVE, FP16, per_item=True),
    Sample((9, 2, 3, 1, 8), ((-INF, -INF), (0.0, 0.5)), BF16),
    Sample((9, 1, 3, 1, 8), ITSELF, FP32),
    Sample((20, 1, 9, 1, 128), ADDITIVE, FP16, outputs="image"),
    Sample((20, 1, 9, 1, 64), ADDITIVE, BF16, outputs="text"),
    Sample((5, 1, 0, 1, 8), ADDITIVE, FP32),
]


# Both architectures run the same code, by the same launches.
@pytest.mark.parametrize(
    ("sample", "arch"),
    [*zip(SAMPLES, itertools.cycle(cuda_backend.ARCHITECTURES), strict=False)],
    ids=str,
)
def test_matches_reference(sample: Sample, arch: int) -> None:
    """Under the tolerance rule, and equal to the bit whatever order the warps go in."""
    kernels = cuda_backend.load()
    sizes, bias, dtype, per_item, outputs = sample
    tensors = attention_tensors(sizes, dtype, per_item)

    def run() -> dict[str, torch.Tensor]:
        return call(kernels, tensors, bias, outputs)

    def check() -> dict[str, torch.Tensor]:
        results = run()
        check_all(results, reference_pair(tensors, bias, outputs), str(sample))
        return results

    same_under_schedules(str(sample), arch, check, run)


@pytest.mark.parametrize("layout", ["heads first", "strided", "odd"])
def test_layouts(layout: str) -> None:
    """Whatever the strides and alignment are, the bits are those of contiguous tensors."""
    kernels = cuda_backend.load()
    tensors = attention_tensors((40, 2, 3, 2, 24), BF16)
    with device.simulate(80):
        expected = call(kernels, tensors, ADDITIVE)
        for name, t in tensors.items():
            if layout == "heads first":
                tensors[name] = t.transpose(-2, -3).contiguous().transpose(-2, -3)
            elif layout == "strided":
                tensors[name] = torch.stack([t, t], dim=-1)[..., 0]
            else:  # no row on 16 bytes
                whole = t.new_zeros(*t.shape[:-1], t.shape[-1] + 1)
                whole[..., 1:] = t
                tensors[name] = whole[..., 1:]
        results = call(kernels, tensors, ADDITIVE)
    for key, t in results.items():
        assert torch.equal(t, expected[key]), key


@pytest.mark.parametrize(
    "values", [*itertools.product([-INF, -1e38, 0.0, 1e38], repeat=2)], ids=str
)
def test_no_bias_gives_nan(values: tuple[float, float]) -> None:
    """What is far greater decides alone; what sees nothing gives 0, and no gradient."""
    kernels = cuda_backend.load()
    tensors = attention_tensors((9, 2, 3, 1, 8), FP32)
    with device.simulate(80):
        results = call(kernels, tensors, (values, values))
        clear = tuple(0.0 if v == max(values) > -INF else -INF for v in values)
        expected = call(kernels, tensors, (clear, clear))
    for key, t in results.items():
        assert torch.equal(t, expected[key]), key
        assert torch.isfinite(t).all(), key
        assert max(values) > -INF or not t.any(), key


@pytest.mark.parametrize("bias", [ADDITIVE, MASKED], ids=["additive", "masked"])
def test_only_what_is_asked_for(bias: Bias) -> None:
    """Each gradient alone has the bits that it has among all, by the launches that it takes."""
    kernels = cuda_backend.load()
    tensors = attention_tensors((70, 2, 3, 1, 16), BF16)
    with device.simulate(80) as run:
        every = call(kernels, tensors, bias)
    assert [kernel_of(r) for r in run.launches] == [
        "attend", "text_out", "text_images", "prepare", "attend_backward",
    ]  # fmt: skip
    for i, name in enumerate(NAMES):
        with device.simulate(80) as run:
            one = call(kernels, tensors, bias, "both", 1 << i)
        assert [key for key in one if key.startswith("d_")] == [f"d_{name}"]
        for key, t in one.items():
            assert torch.equal(t, every[key]), key
        launched = {kernel_of(r) for r in run.launches[2:]}
        # What leads from the results of texts to the gradient, and from those of images.
        by_texts = name != "image_q" if bias == ADDITIVE else name in ("text_q", *NAMES[4:])
        by_images = name != "text_q" if bias == ADDITIVE else name in ("image_q", *NAMES[1:3])
        assert ("text_images" in launched) == by_texts, name
        assert ("prepare" in launched) == (by_images or bias == ADDITIVE), name
    with device.simulate(80) as run:
        call(kernels, tensors, bias, "both", 0)
    assert len(run.launches) == 2


def kernel_of(report: Any) -> str:
    found = re.search(r"attention\d+(\w+?)INS0_", report.name)
    assert found is not None
    return found[1]


@ARCHITECTURES
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_traffic(dtype: torch.dtype, arch: int) -> None:
    """Outputs go out once, in whole sectors; the gradient of the large one comes in once."""
    kernels = cuda_backend.load()
    tensors = attention_tensors((128, 1, 32, 2, 64), dtype)
    d_text, d_image = cotangents(tensors)
    values = [tensors[name] for name in NAMES]
    options = (0.3, 0.0, 1.0, 1.0, 0.0, 3)
    with device.simulate(arch) as run:
        text, image, state = kernels.cross_modal_attention_forward(*values, *options, True)
        gradients = kernels.cross_modal_attention_backward(
            d_text, d_image, *values, state, *options, 63
        )
    attend, text_out, text_images, prepare, backward = run.launches
    for report, t in ((text_out, text), (attend, image), *((backward, g) for g in gradients)):
        moved = report.traffic(t)
        assert moved.written == moved.written_unique == moved.written_sectors == t.nbytes
    moved = text_images.traffic(d_text)
    assert moved.read == moved.read_sectors == d_text.nbytes
    assert prepare.traffic(d_image).read == d_image.nbytes
    for name in ("text_k", "text_v"):  # by three tiles of 64 queries
        assert attend.traffic(tensors[name]).read == 3 * tensors[name].nbytes
    for name in ("text_q", "image_q"):
        assert attend.traffic(tensors[name]).read == tensors[name].nbytes
    for report in run.launches:
        assert report.conflict_ratio == 1.0, (report.name, report.conflicts()[:3])
        multiplies = kernel_of(report).startswith("attend") and dtype == BF16
        assert (report.count("mma.sync") > 0) == multiplies


def test_state_is_what_the_fake_kernel_says() -> None:
    kernels = cuda_backend.load()
    tensors = attention_tensors((7, 3, 2, 1, 5), FP32)
    values = [tensors[name] for name in NAMES]
    with device.simulate(80):
        *_, state = kernels.cross_modal_attention_forward(*values, 1.0, *[0.0] * 4, 3, True)
    expected = STATES["fastadapters", "cuda"](tensors["text_q"], tensors["image_q"], ())
    assert state.numel() == expected


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's operators are those on the machine, which take CPU tensors."""
    monkeypatch.setitem(ops.NAMESPACES, "cuda", cuda_backend.load())
    monkeypatch.setitem(backends._DEVICE, "cuda", "cpu")
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (8, 0))


def test_wide_heads_are_refused(simulated: None) -> None:
    def attend(width: int) -> None:
        functional.cross_modal_attention(**attention_tensors((2, 1, 1, 1, width), FP32))

    with device.simulate(80), fastadapters.backend("cuda"):
        attend(128)
        with pytest.raises(RuntimeError, match="d = 129 are too wide"):
            attend(129)


def test_modules_use_it(simulated: None) -> None:
    """`multimodal_features`, by both calls of the module, forward and backward."""
    torch.manual_seed(0)
    module = modules.MultiModalAdapter(24, 16, 2, hidden_dim=8, mask="additive")
    text, image, tokens = torch.randn(5, 24), torch.randn(3, 24), torch.randn(6, 3, 24)
    leaves = list(module.parameters())

    def step(backend: str) -> list[torch.Tensor]:
        with fastadapters.backend(backend):
            outs = [*module(text, image), module(tokens)]
            return outs + list(torch.autograd.grad(sum(out.sin().sum() for out in outs), leaves))

    with device.simulate(80) as run:
        results = step("cuda")
        log = fastadapters.explain(step, "cuda")
    assert {d.backend for d in log} == {"cuda"} and len(run.launches) == 2 * 2 * 5
    for out, expected in zip(results, step("reference"), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


# Sizes that take each kernel's loops round more than once; wide rows of fp32 have one stage.
MUTATED = {
    "attend": (BF16, [(130, 1, 3, 1, 32)]),
    "attend fp32": (FP32, [(40, 1, 3, 1, 128)]),
    "attend_backward": (BF16, [(130, 1, 3, 1, 32), (3, 1, 130, 1, 32)]),
    "attend_backward fp32": (FP32, [(40, 1, 3, 1, 128), (3, 1, 40, 1, 128)]),
    "text_images": (BF16, [(9, 3, 2, 1, 32)]),
}


@pytest.mark.parametrize("kernel", MUTATED)
def test_every_synchronisation_is_needed(kernel: str) -> None:
    """With any one barrier, commit or wait deleted, the machine finds a fault or another result."""
    kernels, (dtype, samples), stem = cuda_backend.load(), MUTATED[kernel], kernel.split()[0]
    of_texts = stem == "text_images"
    bias, outputs = (ADDITIVE, 3) if of_texts else (((-INF, -INF), (0.0, -INF)), 2)
    options = (0.3, *numbers(bias), outputs)

    def step(sizes: tuple[int, ...]) -> Any:
        values = [*attention_tensors(sizes, dtype).values()]

        def forward() -> Any:
            return kernels.cross_modal_attention_forward(*values, *options, True)

        if stem == "attend":
            return lambda: [forward()[1]]
        with torch.no_grad(), device.simulate(80):
            text, image, state = forward()
        d_text = text if of_texts else None
        return lambda: kernels.cross_modal_attention_backward(
            d_text, image, *values, state, *options, 63
        )

    runs = [step(sizes) for sizes in samples]
    with torch.no_grad(), device.simulate(80) as run:
        runs[0]()
    name = next(r.name for r in run.launches if kernel_of(r) == stem)
    assert unneeded(80, name, runs) == []

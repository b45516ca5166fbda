"""The head's CUDA kernels as compiled for sm_80 and sm_90, run on the PTX machine."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import against_reference
import cuda_backend
import device
import pytest
import torch
import torch.nn.functional as F
from against_reference import Tensors, check_against_reference
from compare import check_all, last_bit
from library_calls import library_launches
from multimodal_cases import ADAPT, ADDITIVE, BIASES, INF, MASKED, head_tensors, logits
from schedules import unneeded
from test_golden import CASES, check_on_kernels
from torch import Tensor

import fastadapters
from fastadapters.cuda_limits import head_refusal
from fastadapters.ops.codes import DTYPE_CODES
from fastadapters.ops.multimodal import ADAPT_CODES, PARAMETERS, STATES

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason=device.TOOLS),
    pytest.mark.usefixtures("simulated"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHITECTURES = pytest.mark.parametrize("arch", cuda_backend.ARCHITECTURES, ids="sm_{}".format)
TEXTS_ONLY = ((0.0, -INF), (0.0, 0.0))
ITSELF = ((-INF, 0.0), (-INF, 0.0))


def check(tensors: Tensors, name: str, arch: int = 80, seed: int = 0, **options: Any) -> Any:
    """Logits and all gradients under the tolerance rule; the simulation."""

    def op(t: Tensors) -> Tensor:
        scalars = {"logit_scale": t.get("scale"), "blend": t.get("blend")}
        return logits(t, **options | {k: v for k, v in scalars.items() if v is not None})

    with device.simulate(arch, seed) as run:
        check_against_reference(op, tensors, name, "cuda")
    return run


def sample(
    *sizes: int, dtype: torch.dtype = FP32, learnable: bool = False, **layers: int
) -> Tensors:
    tensors = head_tensors(*sizes, dtype, **layers)
    if learnable:
        tensors |= {"scale": torch.tensor(50.0).to(dtype), "blend": torch.tensor(0.3).to(dtype)}
    return tensors


FORMS = [
    (*form, dtype)
    for form, dtype in zip(
        itertools.product((1, 2), BIASES, ADAPT), itertools.cycle((FP32, BF16, FP16, FP32))
    )
]


@pytest.mark.parametrize(("layers", "bias", "adapt", "dtype"), FORMS, ids=str)
def test_forms(
    layers: int, bias: Sequence[Sequence[float]], adapt: str, dtype: torch.dtype
) -> None:
    tensors = sample(11, 6, 40, 16, 8, dtype=dtype, learnable=True, down=layers, up=layers)
    arch = 80 if dtype == FP32 else 90
    activation = "identity" if adapt == "text" else "gelu"
    run = check(tensors, adapt, arch, bias=bias, adapt=adapt, down_activation=activation)
    backward = next(i for i, r in enumerate(run.launches) if "backward" in r.name)
    assert backward <= 8
    assert len(run.launches) - backward <= 14


@pytest.mark.parametrize("bias", [MASKED, ADDITIVE], ids=["masked", "additive"])
def test_nothing_is_left_to_the_library(bias: Sequence[Sequence[float]]) -> None:
    """What `test_forms` counts is all that is launched. Plain PyTorch's products would be seen."""
    tensors = {n: t.requires_grad_() for n, t in sample(5, 3, 12, 8, 4, down=2).items()}
    d_logits = torch.ones(3, 5)

    def step() -> None:
        torch.autograd.grad(logits(tensors, bias=bias), [*tensors.values()], d_logits)

    with device.simulate(80), fastadapters.backend("cuda"):
        assert library_launches(step) == []
    with fastadapters.backend("eager"):
        assert library_launches(step).count("mm") > 10


GOLDEN = [case for case in CASES if case[0].name.startswith("mma")]


@pytest.mark.parametrize(("path", "build", "run"), GOLDEN, ids=lambda v: getattr(v, "stem", ""))
def test_golden(path: Path, build: Any, run: Any) -> None:
    """The published modules' logits, and features by `cross_modal_attention`, with gradients."""
    with device.simulate(80):
        check_on_kernels(path, build, run, "cuda")


SIZES = [  # C, B, D, E, R; heads
    (1, 1, 16, 8, 4, 2),
    (1, 3, 7, 6, 1, 3),
    (4, 1, 16, 8, 4, 1),
    (3, 0, 16, 8, 4, 2),
    (70, 37, 50, 36, 13, 3),
    (9, 34, 33, 80, 40, 2),  # wider heads
    (35, 3, 20, 70, 9, 1),
    (134, 5, 12, 8, 4, 2),  # more texts than the warps of a block take at a time
]


@ARCHITECTURES
@pytest.mark.parametrize("bias", [MASKED, ADDITIVE], ids=["masked", "additive"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes: tuple[int, ...], bias: Sequence[Sequence[float]], arch: int) -> None:
    *shape, heads = sizes
    check(sample(*shape), "sizes", arch, bias=bias, num_heads=heads)


@pytest.mark.parametrize("bias", [TEXTS_ONLY, ITSELF], ids=["texts", "itself"])
def test_more_rows_than_a_tile(bias: Sequence[Sequence[float]]) -> None:
    check(sample(70, 37, 50, 36, 13, up=1), "rows", bias=bias, num_heads=3)


def test_vectors_beyond_shared_memory() -> None:
    """Many heads and a wide last layer: the pair stage's vectors, and the factor, lie in memory."""
    check(sample(3, 2, 48, 64, 88), "large", 89, bias=ADDITIVE, num_heads=64)


def test_mixed_dtypes() -> None:
    """Each tensor is read in its own dtype, and its gradient has it."""
    tensors = sample(11, 6, 40, 16, 8)
    for i, name in enumerate(tensors):
        tensors[name] = tensors[name].to((BF16, FP32, FP16)[i % 3]).float()
    before = {name: t.clone() for name, t in tensors.items()}
    stored = {name: t.to((BF16, FP32, FP16)[i % 3]) for i, (name, t) in enumerate(before.items())}

    def op(t: Tensors) -> Tensor:
        return logits(t, bias=ADDITIVE)

    with device.simulate(80):
        mixed = against_reference.run(op, stored, "cuda")
        single = against_reference.run(op, tensors, "cuda")
    for name, t in stored.items():
        assert mixed[f"d_{name}"].dtype == t.dtype
        assert torch.equal(mixed[f"d_{name}"], single[f"d_{name}"].to(t.dtype)), name


@pytest.mark.parametrize("bias", [MASKED, ADDITIVE, TEXTS_ONLY], ids=["masked", "both", "texts"])
def test_what_the_adapter_gives_nearly_cancels(bias: Sequence[Sequence[float]]) -> None:
    """|u| = |W e + c| is a thousandth of |c|: the square of that must not be lost in rounding."""
    tensors = sample(20, 7, 256, 16, 8)
    tensors["up0.weight"] *= 2e-4
    e = F.gelu(tensors["up0.bias"]).double()
    away = 1e-3 * torch.randn(256, generator=torch.Generator().manual_seed(1))
    tensors["up1.bias"] = (-(tensors["up1.weight"].double() @ e) * (1 + away)).float()
    with device.simulate(80):
        out = against_reference.run(lambda t: logits(t, bias=bias), tensors, "cuda")

    def pair(draw: int) -> tuple[Tensors, Tensors]:
        moved = {name: last_bit(t, draw, FP32) for name, t in tensors.items()}
        exact = {name: t.double() for name, t in moved.items()}
        run = [
            against_reference.run(lambda t: logits(t, bias=bias), t, "reference")
            for t in (exact, moved)
        ]
        return {"out 0": run[0]["out 0"]}, {"out 0": run[1]["out 0"]}

    check_all({"out 0": out["out 0"]}, pair, "cancel")


@pytest.mark.parametrize("adapt", ADAPT)
@pytest.mark.parametrize("bias", [MASKED, ADDITIVE], ids=["masked", "additive"])
def test_degenerate_rows(bias: Sequence[Sequence[float]], adapt: str) -> None:
    """A text and an image of zeros, and an adapter that gives 0."""
    tensors = sample(7, 3, 32, 16, 8)
    tensors["text"][2] = 0
    tensors["image"][1] = 0
    check(tensors, "zero rows", bias=bias, adapt=adapt)
    for name in ("up1.weight", "up1.bias"):
        tensors[name] = torch.zeros_like(tensors[name])
    check(tensors, "zero adapter", bias=bias, adapt=adapt)


@ARCHITECTURES
@pytest.mark.parametrize("bias", [MASKED, ADDITIVE], ids=["masked", "additive"])
def test_schedules_give_equal_bits(bias: Sequence[Sequence[float]], arch: int) -> None:
    tensors = sample(37, 35, 40, 16, 8, learnable=True)
    results = []
    for seed in range(3):
        with device.simulate(arch, seed):
            op = lambda t: logits(t, bias=bias, blend=t["blend"], logit_scale=t["scale"])  # noqa: E731
            results.append(against_reference.run(op, tensors, "cuda"))
    for other in results[1:]:
        for name, t in results[0].items():
            assert torch.equal(other[name], t), name


KEYS = ("text", "image", *PARAMETERS)


def arguments(tensors: Tensors, bias: Sequence[Sequence[float]], **options: Any) -> tuple[Any, ...]:
    """Parameters and options of the ops themselves, with two layers down and up."""
    layers = ("down0", "down1", "in0", "out0", "up0", "up1")
    values = [tensors[f"{layer}.{kind}"] for layer in layers for kind in ("weight", "bias")]
    scalars = (tensors["blend"].reshape(1), tensors["scale"].reshape(1))
    adapt, heads = ADAPT_CODES[options.get("adapt", "both")], options.get("heads", 4)
    return (*values, *scalars, 0.0, 0.0, heads, *bias[0], *bias[1], adapt, 2, DTYPE_CODES[FP32])


def forward(
    simulated: Any, tensors: Tensors, bias: Sequence[Sequence[float]], **options: Any
) -> tuple[Tensor, Tensor]:
    """The logits, and the state that forward leaves."""
    rest = arguments(tensors, bias, **options)
    logits, state = simulated.multimodal_logits_forward(
        tensors["text"], tensors["image"], *rest, True
    )
    return logits, state


def backward(
    simulated: Any,
    tensors: Tensors,
    bias: Sequence[Sequence[float]],
    state: Tensor,
    needs: Sequence[str] = KEYS,
    **options: Any,
) -> dict[str, Tensor]:
    """The gradients that are asked for."""
    text, image = tensors["text"], tensors["image"]
    d_logits = torch.ones(image.shape[0], text.shape[0])
    bits = sum(1 << KEYS.index(name) for name in needs)
    gradients = simulated.multimodal_logits_backward(
        d_logits, text, state, image, *arguments(tensors, bias, **options), bits
    )
    return {name: g for name, g in zip(KEYS, gradients, strict=True) if g.numel()}


@pytest.mark.parametrize("bias", [MASKED, ADDITIVE], ids=["masked", "additive"])
def test_computes_only_what_is_asked(bias: Sequence[Sequence[float]], simulated: Any) -> None:
    """Each gradient alone is that among all; without features and projections no attention."""
    tensors = sample(9, 5, 24, 16, 8, learnable=True, down=2)
    with torch.no_grad(), device.simulate(80):
        _, state = forward(simulated, tensors, bias)
        every = backward(simulated, tensors, bias, state)
    assert [*every] == [*KEYS]
    for name in KEYS:
        with torch.no_grad(), device.simulate(80) as run:
            alone = backward(simulated, tensors, bias, state, [name])
        assert [*alone] == [name]
        assert torch.equal(alone[name], every[name]), name
        attention = [r for r in run.launches if "attend_backward" in r.name]
        needs = name in ("text", "image") or name.startswith(("down", "in_"))
        assert len(attention) == needs, name
        if name == "logit_scale":
            assert len(run.launches) == 2


def test_state_is_what_the_fake_kernel_says(simulated: Any) -> None:
    tensors = sample(9, 5, 23, 12, 7, learnable=True, down=2)
    with torch.no_grad(), device.simulate(80):
        size = forward(simulated, tensors, ADDITIVE)[1].numel()
    of: dict[str, Any] = {k: tensors[k] for k in ("text", "image")} | {"num_heads": 4}
    of |= {"out_weight": tensors["out0.weight"], "down_weight": tensors["down0.weight"]}
    of |= {"down_weight_2": tensors["down1.weight"], "up_weight": tensors["up0.weight"]}
    of |= {"up_weight_2": tensors["up1.weight"]}
    assert STATES["fastadapters", "cuda"](of) == size


@ARCHITECTURES
@pytest.mark.parametrize("bias", [MASKED, ADDITIVE], ids=["masked", "additive"])
def test_traffic(bias: Sequence[Sequence[float]], arch: int) -> None:
    """Logits go out once, in whole sectors, and no bank conflict slows a loop."""
    tensors = sample(64, 32, 96, 64, 32)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    with device.simulate(arch) as run, fastadapters.backend("cuda"):
        out = logits(leaves, bias=bias)
        forward = len(run.launches)
        out.sum().backward()
    last = run.launches[forward - 1]
    assert last.traffic(out).written == last.traffic(out).written_sectors == out.nbytes
    assert run.total().traffic(out).written == out.nbytes
    for report in run.launches:
        assert report.conflict_ratio <= 1.02, (report.name, report.conflicts()[:3])


def test_widest_head(simulated: Any) -> None:
    """The launchers take what `head_refusal` says, and no more."""

    def refusal(width: int) -> str | None:
        return head_refusal((1, 1, 9, 1, width, 1), (8, 9))

    largest = max(width for width in range(32, 1024, 32) if refusal(width) is None)
    for width in (largest, largest + 1):
        tensors = sample(1, 1, 4, width, 2, learnable=True, down=2)
        with torch.no_grad(), device.simulate(89):
            _, state = forward(simulated, tensors, ADDITIVE, heads=1)
            if width == largest:
                backward(simulated, tensors, ADDITIVE, state, heads=1)
                continue
            with pytest.raises(RuntimeError, match="CUDA"):
                backward(simulated, tensors, ADDITIVE, state, heads=1)


# Sizes that take each kernel's loops round more than once: C, B, D, E, R; its options.
IMAGES: dict[str, Any] = {"adapt": "image", "heads": 1, "bias": ADDITIVE}
MUTATED: dict[str, list[tuple[tuple[int, ...], dict[str, Any]]]] = {
    "attend": [((134, 3, 8, 40, 4), IMAGES)],
    "attend_backward": [((134, 3, 8, 40, 4), IMAGES), ((3, 134, 8, 40, 4), IMAGES)],
    "hidden_backward": [((3, 2, 8, 40, 4), {"bias": MASKED})],
    "mix_backward": [((70, 3, 9, 8, 4), {"bias": MASKED})],
    "mix_forward": [((70, 3, 9, 8, 9), {"bias": MASKED})],
    "pair_backward": [((40, 3, 9, 8, 64), {"bias": ADDITIVE})],
    "pair_forward": [((20, 3, 70, 8, 9), {"bias": ADDITIVE})],
    "rows_backward": [((3, 2, 40, 40, 40), {"bias": ADDITIVE})],
    "rows_forward": [((3, 2, 40, 8, 40), {"bias": b}) for b in (MASKED, TEXTS_ONLY)],
    "run_stage": [((70, 3, 70, 8, 4), {"bias": MASKED})],
}


@pytest.mark.parametrize("kernel", MUTATED)
def test_every_synchronisation_is_needed(kernel: str, simulated: Any) -> None:
    """With any one barrier, commit or wait deleted, the machine finds a fault or another result.

    What a warp's lanes hand each other in memory, as one of `run_stage` do, it does not see.
    """
    shared = "ILb1E" if kernel.startswith("pair") else "E"
    name = next(n for n in device.cuda_kernels() if re.search(rf"head\d+{kernel}{shared}", n))

    def step(sizes: tuple[int, ...], options: dict[str, Any]) -> Callable[[], Sequence[Tensor]]:
        tensors = sample(*sizes, learnable=True, down=2)
        with torch.no_grad(), device.simulate(80):
            state = forward(simulated, tensors, **options)[1]
        if "forward" in kernel or kernel == "attend":
            return lambda: forward(simulated, tensors, **options)[:1]
        gradients = lambda: [*backward(simulated, tensors, state=state, **options).values()]  # noqa: E731
        if kernel == "run_stage":  # has parts of its own each way
            return lambda: [forward(simulated, tensors, **options)[0], *gradients()]
        return gradients

    runs = [step(*sizes) for sizes in MUTATED[kernel]]
    block_wide = "bar.sync" if kernel == "run_stage" else ""
    assert unneeded(80, name, runs, block_wide) == []

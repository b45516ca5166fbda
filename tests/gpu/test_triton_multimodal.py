"""The head's Triton kernels as compiled for sm_80 and sm_90, run on the PTX machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import against_reference
import device
import pytest
import torch
from against_reference import Tensors, check_against_reference
from library_calls import library_launches
from multimodal_cases import ADDITIVE, INF, MASKED, head_tensors, logits
from schedules import missed
from torch import Tensor

import fastadapters
from fastadapters import backends
from fastadapters.ops.codes import DTYPE_CODES
from fastadapters.ops.multimodal import PARAMETERS

pytest.importorskip("triton")
from fastadapters.kernels import multimodal as kernels
from fastadapters.kernels.multimodal import backward, forward, parameter_launches, tiles
from fastadapters.kernels.multimodal import call as linear_launches

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BOTH = pytest.mark.parametrize("bias", [MASKED, ADDITIVE], ids=["masked", "additive"])
KEYS = ("text", "image", *PARAMETERS)


@pytest.fixture(autouse=True)
def on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine runs kernels on CPU tensors, which the backend itself refuses."""
    monkeypatch.setattr(backends, "_why_not", lambda *args: None)


def sample(
    *sizes: int, dtype: torch.dtype = FP32, learnable: bool = False, **layers: int
) -> Tensors:
    tensors = head_tensors(*sizes, dtype, **layers)
    if learnable:
        tensors |= {"scale": torch.tensor(50.0).to(dtype), "blend": torch.tensor(0.3).to(dtype)}
    return tensors


def op(t: Tensors, **options: Any) -> Tensor:
    numbers = {"logit_scale": t.get("scale"), "blend": t.get("blend")}
    return logits(t, **options | {k: v for k, v in numbers.items() if v is not None})


def check(tensors: Tensors, arch: int, seed: int = 0, **options: Any) -> device.Simulation:
    """Logits and all gradients under the tolerance rule."""
    with device.simulate(arch, seed) as run:
        check_against_reference(lambda t: op(t, **options), tensors, "head", "triton")
    return run


# Bias, adapt, layers up and down, dtype; the interpreter has every form.
FORMS = [
    (80, ADDITIVE, "both", 1, 2, BF16),
    (90, ADDITIVE, "text", 2, 1, FP16),
    (90, MASKED, "both", 1, 1, FP32),
    (80, ((0.0, -INF), (-INF, 2.0)), "both", 2, 1, FP32),
]


@pytest.mark.parametrize(("arch", "bias", "adapt", "up", "down", "dtype"), FORMS, ids=str)
def test_forms(
    arch: int,
    bias: Sequence[Sequence[float]],
    adapt: str,
    up: int,
    down: int,
    dtype: torch.dtype,
) -> None:
    tensors = sample(11, 6, 40, 16, 8, dtype=dtype, learnable=True, down=down, up=up)
    check(tensors, arch, bias=bias, adapt=adapt, down_activation="gelu")


@pytest.mark.parametrize("bias", [((-INF,) * 2,) * 2, ADDITIVE], ids=["image", "both"])
def test_blend_is_rounded_once(bias: Sequence[Sequence[float]]) -> None:
    adapt = "both" if bias == ADDITIVE else "image"
    check(sample(7, 5, 32, 16, 8), 80, bias=bias, adapt=adapt, blend=0.9999)


def test_sums_of_narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton may keep parts of a sum apart over a loop: it must not be one that is taken off."""
    attention = backward._attention

    def with_narrow_tiles(*args: Any) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "STEPS", 16)
            return attention(*args)

    monkeypatch.setattr(backward, "_attention", with_narrow_tiles)
    check(sample(5, 3, 72, 48, 24), 90, bias=ADDITIVE, num_heads=3)


@pytest.mark.parametrize(
    ("arch", "sizes"),
    [(90, (37, 21, 72, 48, 24, 3)), (80, (3, 2, 20, 36, 70, 3))],
    ids=["ragged", "R 70"],
)
def test_sizes(arch: int, sizes: tuple[int, ...]) -> None:
    """More than a tile of everything; more of R than a product takes at once.

    And the same bits whatever order the warps go in.
    """
    *shape, heads = sizes
    tensors, results = sample(*shape), []
    check(tensors, arch, 1, bias=ADDITIVE, num_heads=heads)
    for seed in (2, 3):
        with device.simulate(arch, seed):
            results.append(
                against_reference.run(
                    lambda t: op(t, bias=ADDITIVE, num_heads=heads), tensors, "triton"
                )
            )
    for name, t in results[0].items():
        assert torch.equal(t, results[1][name]), name


def call(
    tensors: Tensors, bias: Sequence[Sequence[float]], needs: Sequence[str], down: int = 1
) -> dict[str, Tensor]:
    """The ops themselves: the gradients asked for."""
    absent = [] if down == 2 else [None, None]
    layers = ("down0", "down1", "in0", "out0", "up0", "up1")
    values: list[Any] = [
        tensors[f"{layer}.{kind}"]
        for layer in layers
        for kind in ("weight", "bias")
        if f"{layer}.{kind}" in tensors
    ]
    values[2:2] = absent
    parameters = (*values, tensors["blend"].reshape(1), tensors["scale"].reshape(1))
    options = (0.0, 0.0, 4, *bias[0], *bias[1], 0, 2, DTYPE_CODES[FP32])
    text, image = tensors["text"], tensors["image"]
    _, state = kernels.multimodal_logits_forward(text, image, *parameters, *options, True)
    gradients = kernels.multimodal_logits_backward(
        torch.ones(image.shape[0], text.shape[0]),
        text,
        state,
        image,
        *parameters,
        *options,
        sum(1 << KEYS.index(name) for name in needs),
    )
    return {name: g for name, g in zip(KEYS, gradients, strict=True) if g.numel()}


@BOTH
def test_launches(bias: Sequence[Sequence[float]]) -> None:
    tensors = sample(9, 5, 24, 16, 8, learnable=True, down=2)
    with device.simulate(80) as run:
        call(tensors, bias, KEYS, down=2)
    names = [report.name.removesuffix("_kernel") for report in run.launches]
    forward = names.index("d_cosines")
    assert forward <= 10 and len(names) - forward <= 17
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}

    def step() -> None:
        torch.autograd.grad(op(leaves, bias=bias), [*leaves.values()], torch.empty(5, 9))

    with device.simulate(80), fastadapters.backend("triton"):
        assert library_launches(step) == []


def test_computes_only_what_is_asked() -> None:
    """A gradient alone is that among all; without features and projections no attention."""
    tensors = sample(9, 5, 24, 16, 8, learnable=True)
    with device.simulate(80):
        every = call(tensors, ADDITIVE, KEYS)
    assert [*every] == [name for name in KEYS if name not in ("down_weight_2", "down_bias_2")]
    for name in ("in_bias", "up_bias_2", "logit_scale"):
        with device.simulate(80) as run:
            alone = call(tensors, ADDITIVE, [name])
        assert [*alone] == [name]
        torch.testing.assert_close(alone[name], every[name], rtol=1e-5, atol=1e-5)
        ran = [report.name for report in run.launches]
        assert ("keys_kernel" in ran) == (name == "in_bias"), name
        assert ("similarity_kernel" in ran) == (name != "logit_scale"), name


def test_tf32_where_the_precision_setting_allows_it() -> None:
    tensors = sample(37, 21, 72, 48, 24)
    exact = {name: t.double() for name, t in tensors.items()}
    with fastadapters.backend("reference"):
        gold = logits(exact, bias=ADDITIVE, num_heads=3)
    torch.set_float32_matmul_precision("high")
    try:
        with device.simulate(80) as run, fastadapters.backend("triton"):
            out = logits(tensors, bias=ADDITIVE, num_heads=3)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert run.total("linear_kernel").count("mma.sync") > 0
    error = (out - gold).square().mean().sqrt() / gold.square().mean().sqrt()
    assert 2**-14 < error < 2**-8


def compiled() -> int:
    """How many kernels have been compiled for sm_80."""
    from triton.runtime.jit import JITFunction

    modules = (forward, backward, linear_launches, parameter_launches)
    found = {id(v): v for m in modules for v in vars(m).values() if isinstance(v, JITFunction)}
    return sum(len(kernel.device_caches[80][0]) for kernel in found.values())


@BOTH
def test_class_count_and_batch_size_are_no_reason_to_compile(
    bias: Sequence[Sequence[float]],
) -> None:
    counts = []
    for c, b in ((2, 1), (1, 2), (16, 3), (5, 17)):
        with device.simulate(80):
            call(sample(c, b, 24, 16, 8, learnable=True), bias, KEYS)
            counts.append(compiled())
    assert counts[1:] == counts[:-1]


@BOTH
def test_traffic(bias: Sequence[Sequence[float]]) -> None:
    """Logits go out once, in whole sectors."""
    tensors = sample(64, 32, 24, 16, 8, learnable=True)
    with device.simulate(80) as run, fastadapters.backend("triton"):
        out = op(tensors, bias=bias)
    moved = run.launches[-1].traffic(out)
    assert moved.written == moved.written_sectors == out.nbytes
    assert run.total().traffic(out).written == out.nbytes


@pytest.mark.parametrize("kernel", ["features", "d_pairs"])
def test_own_barriers_are_needed(kernel: str) -> None:
    """Those before what other threads have stored is loaded; the rest are the compiler's.

    Of one the loss is seen: in front of another a thread may load but what it stored itself.
    """
    source = Path(kernels.__file__).with_name(f"{kernel}.py").read_text().splitlines()
    lines = [i for i, line in enumerate(source, 1) if "debug_barrier" in line]
    kinds = tuple(f"line {i}: bar.sync" for i in lines)
    tensors = sample(37, 21, 24, 16, 8, learnable=True)
    assert missed(80, f"{kernel}_kernel", lambda: call(tensors, ADDITIVE, KEYS), kinds)

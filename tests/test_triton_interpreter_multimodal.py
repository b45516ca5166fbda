"""The Triton kernels of the multi-modal head in Triton's interpreter: what they compute."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import against_reference
import pytest
import torch
import torch.nn.functional as F
from against_reference import Tensors, check_against_reference
from compare import check_all, last_bit
from interpreter import interpreted, run_in_a_process_of_its_own
from multimodal_cases import ADAPT, ADDITIVE, BIASES, INF, MASKED, head_tensors, logits
from test_golden import CASES, check_on_kernels
from torch import Tensor

from fastadapters import backends

pytest.importorskip("triton")

FP16, FP32 = torch.float16, torch.float32
TEXTS_ONLY = ((0.0, -INF), (0.0, 0.0))
ITSELF = ((-INF, 0.0), (-INF, 0.0))


def test_in_a_process_of_its_own() -> None:
    run_in_a_process_of_its_own(__file__)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend take CPU tensors, and cut them into few programs, as suits it."""
    from fastadapters.kernels.multimodal import tiles

    monkeypatch.setattr(backends, "_why_not", lambda *args: None)
    for name in ("ROWS", "COLUMNS", "STEPS", "QUERIES", "KEYS", "FEATURE_ROWS", "FEATURE_COLUMNS"):
        monkeypatch.setattr(tiles, name, 64)
    for name in ("PAIRS", "D_PAIRS", "FEWER_D_PAIRS"):
        monkeypatch.setattr(tiles, name, 4096)
    monkeypatch.setattr(tiles, "SUMS", 8192)


def sample(
    *sizes: int, dtype: torch.dtype = FP32, learnable: bool = False, **layers: int
) -> Tensors:
    tensors = head_tensors(*sizes, dtype, **layers)
    if learnable:
        tensors |= {"scale": torch.tensor(50.0).to(dtype), "blend": torch.tensor(0.3).to(dtype)}
    return tensors


def check(tensors: Tensors, name: str, **options: Any) -> None:
    """Logits and all gradients under the tolerance rule."""

    def op(t: Tensors) -> Tensor:
        numbers = {"logit_scale": t.get("scale"), "blend": t.get("blend")}
        return logits(t, **options | {k: v for k, v in numbers.items() if v is not None})

    check_against_reference(op, tensors, name, "triton")


# Two layers behind the attention, and before it, come in turn with one.
FORMS = [
    (*form, 1 + i % 2, 1 + i // 2 % 2, (FP32, FP32, FP16)[i % 3])
    for i, form in enumerate(itertools.product(BIASES, ADAPT))
]


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(("bias", "adapt", "up", "down", "dtype"), FORMS, ids=str)
def test_forms(
    bias: Sequence[Sequence[float]], adapt: str, up: int, down: int, dtype: torch.dtype
) -> None:
    tensors = sample(11, 6, 40, 16, 8, dtype=dtype, learnable=True, down=down, up=up)
    check(tensors, adapt, bias=bias, adapt=adapt, down_activation="gelu")


GOLDEN = [case for case in CASES if "official" in case[0].name and "shared" not in str(case[2])]


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(("path", "build", "run"), GOLDEN, ids=lambda v: getattr(v, "stem", ""))
def test_golden(path: Path, build: Any, run: Any) -> None:
    """The published modules' logits, and features by `cross_modal_attention`, with gradients."""
    check_on_kernels(path, build, run, "triton")


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("bias", [MASKED, ADDITIVE], ids=["masked", "additive"])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 16, 8, 4, 2), (1, 3, 7, 6, 1, 3), (3, 0, 16, 8, 4, 2), (70, 9, 50, 36, 70, 3)],
    ids=str,
)
def test_sizes(sizes: tuple[int, ...], bias: Sequence[Sequence[float]]) -> None:
    """C, B, D, E, R and heads."""
    *shape, heads = sizes
    check(sample(*shape), "sizes", bias=bias, num_heads=heads)


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("adapt", ["both", "image"])
@pytest.mark.parametrize("bias", [MASKED, ADDITIVE, TEXTS_ONLY], ids=["masked", "both", "texts"])
def test_degenerate_rows(bias: Sequence[Sequence[float]], adapt: str) -> None:
    """A text and an image of zeros, a text below the floor of a length, an adapter that gives 0."""
    tensors = sample(7, 3, 32, 16, 8)
    tensors["text"][2] = 0
    tensors["text"][4] *= 1e-14
    tensors["image"][1] = 0
    check(tensors, "zero rows", bias=bias, adapt=adapt)
    for name in ("up1.weight", "up1.bias"):
        tensors[name] = torch.zeros_like(tensors[name])
    check(tensors, "zero adapter", bias=bias, adapt=adapt)


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("bias", [MASKED, ADDITIVE, TEXTS_ONLY], ids=["masked", "both", "texts"])
def test_what_the_adapter_gives_nearly_cancels(bias: Sequence[Sequence[float]]) -> None:
    """|u| = |W e + c| is a thousandth of |c|: the square of that must not be lost in rounding."""
    tensors = sample(20, 7, 64, 16, 8)
    tensors["up0.weight"] *= 2e-4
    e = F.gelu(tensors["up0.bias"]).double()
    away = 1e-3 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    tensors["up1.bias"] = (-(tensors["up1.weight"].double() @ e) * (1 + away)).float()
    out = against_reference.run(lambda t: logits(t, bias=bias), tensors, "triton")

    def pair(draw: int) -> tuple[Tensors, Tensors]:
        moved = {name: last_bit(t, draw, FP32) for name, t in tensors.items()}
        exact = {name: t.double() for name, t in moved.items()}
        gold, base = (
            against_reference.run(lambda t: logits(t, bias=bias), t, "reference")["out 0"]
            for t in (exact, moved)
        )
        return {"out 0": gold}, {"out 0": base}

    check_all({"out 0": out["out 0"]}, pair, "cancel")

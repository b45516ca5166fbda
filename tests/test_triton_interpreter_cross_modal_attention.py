"""The Triton kernels of cross-modal attention in Triton's interpreter: what they compute."""

from __future__ import annotations

import pytest
import torch
from attention_cases import ADDITIVE, BIASES, INF, MASKED, attention_tensors, call, reference_pair
from compare import check_all
from interpreter import interpreted, run_in_a_process_of_its_own

import fastadapters
from fastadapters import backends, functional
from fastadapters.reference.cross_modal_attention import Bias

pytest.importorskip("triton")

FP16, FP32 = torch.float16, torch.float32


def test_in_a_process_of_its_own() -> None:
    run_in_a_process_of_its_own(__file__)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_why_not", lambda *args: None)


# C, I, B, H, d; bias; whether texts are the items' own: every block of a bias, more than a tile of
# everything, single tokens, widths between powers of two and beyond the tiles', no items.
FORMS = [
    *(((37, 1, 3, 1, 16), bias, False) for bias in BIASES),
    *(((9, 3, 2, 1, 33), bias, True) for bias in BIASES),
    ((70, 2, 5, 1, 8), MASKED, False),
    ((1, 1, 1, 1, 8), ADDITIVE, False),
    ((20, 2, 2, 1, 130), ADDITIVE, False),
    ((5, 2, 0, 2, 8), ADDITIVE, False),
]


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    ("sizes", "bias", "per_item", "dtype"),
    [(*form, (FP32, FP16)[i % 2]) for i, form in enumerate(FORMS)],
    ids=str,
)
def test_matches_reference(
    sizes: tuple[int, ...], bias: Bias, per_item: bool, dtype: torch.dtype
) -> None:
    tensors = attention_tensors(sizes, dtype, per_item)
    out = call(torch.ops.fastadapters_triton, tensors, bias)
    check_all(out, reference_pair(tensors, bias), f"{sizes} {bias}")


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("outputs", ["text", "image"])
@pytest.mark.parametrize("bias", [MASKED, ADDITIVE, ((-INF,) * 2, (1.0, -INF))], ids=str)
def test_one_output(bias: Bias, outputs: str) -> None:
    tensors = attention_tensors((20, 2, 3, 2, 16), FP32)
    out = call(torch.ops.fastadapters_triton, tensors, bias, outputs)
    check_all(out, reference_pair(tensors, bias, outputs), f"{outputs} {bias}")


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
def test_strides() -> None:
    """Heads before tokens, and one set of values for all heads."""
    tensors = attention_tensors((20, 2, 3, 2, 16), FP32)
    strided = {k: t.transpose(-2, -3).contiguous().transpose(-2, -3) for k, t in tensors.items()}
    for name in ("text_v", "image_v"):
        tensors[name] = strided[name] = tensors[name][..., :1, :].expand_as(tensors[name])
    with fastadapters.backend("triton"):
        outs = functional.cross_modal_attention(**strided, bias=ADDITIVE)
        expected = functional.cross_modal_attention(
            **{k: t.contiguous() for k, t in tensors.items()}, bias=ADDITIVE
        )
    for out, same in zip(outs, expected, strict=True):
        assert torch.equal(out, same)

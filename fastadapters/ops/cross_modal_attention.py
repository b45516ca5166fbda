"""Cross-modal attention as a PyTorch operator: schemas, fake kernels, autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd, schemas
from .flops import Formula

_TENSORS = "Tensor text_k, Tensor text_v, Tensor image_q, Tensor image_k, Tensor image_v"
_OPTIONS = "float scale, float bias_tt, float bias_ti, float bias_it, float bias_ii, int outputs"
# What `outputs` is a sum of.
TEXT, IMAGE = 1, 2

SCHEMAS = {
    "cross_modal_attention_forward": f"(Tensor text_q, {_TENSORS}, {_OPTIONS}, bool save)"
    " -> (Tensor text_out, Tensor image_out, Tensor state)",
    "cross_modal_attention_backward": "(Tensor? d_text_out, Tensor? d_image_out, Tensor text_q,"
    f" {_TENSORS}, Tensor state, {_OPTIONS}, int needs) -> (Tensor d_text_q, Tensor d_text_k,"
    " Tensor d_text_v, Tensor d_image_q, Tensor d_image_k, Tensor d_image_v)",
}

# How many fp32 numbers the forward keeps for backward, by namespace and device: a function of
# text_q, image_q and the options from scale to outputs.
State = Callable[[Tensor, Tensor, Sequence[Any]], int]


def rows_of_state(text_q: Tensor, image_q: Tensor, options: Sequence[Any]) -> int:
    """Of each head of each token, the attention and two constants for each modality of keys."""
    width = image_q.shape[-1]
    return (text_q.numel() + image_q.numel()) // width * (width + 4)


def rows_of_state_by_modality(text_q: Tensor, image_q: Tensor, options: Sequence[Any]) -> int:
    """Of each head of each token, for each modality of keys that its own attention is kept over
    (a text's over the texts alone), the attention and two constants.
    """
    width = image_q.shape[-1]
    return (text_q.numel() + 2 * image_q.numel()) // width * (width + 2)


def padded_rows_of_state(text_q: Tensor, image_q: Tensor, options: Sequence[Any]) -> int:
    """Of each head of each token, the attention, padded for either modality, and two constants."""
    rows = [t.numel() // t.shape[-1] for t in (text_q, image_q)]
    return sum(-(-n * image_q.shape[-1] // 4) * 4 + 2 * n for n in rows)


STATES: dict[tuple[str, str], State] = {
    (schemas.COMPILED, "cpu"): rows_of_state_by_modality,
    (schemas.COMPILED, "cuda"): padded_rows_of_state,
    (schemas.TRITON, "cuda"): rows_of_state,
    (schemas.TRITON, "cpu"): rows_of_state,
}


def allocate_forward(
    text_q: Tensor, image_q: Tensor, outputs: int, state: int
) -> tuple[Tensor, Tensor, Tensor]:
    """text_out [B, C, H, d] and image_out [B, I, H, d], empty if not asked for, and the state."""
    items, _, heads, width = image_q.shape
    text = (items, text_q.shape[-3], heads, width) if outputs & TEXT else (0,)
    image = image_q.shape if outputs & IMAGE else (0,)
    return (
        image_q.new_empty(text),
        image_q.new_empty(image),
        image_q.new_empty(state, dtype=torch.float32),
    )


def allocate_gradients(tensors: Sequence[Tensor], needs: int) -> tuple[Tensor, ...]:
    """A gradient for each tensor whose bit is set in ``needs``; empty tensors else."""
    return tuple(t.new_empty(t.shape if needs >> i & 1 else (0,)) for i, t in enumerate(tensors))


def _blocks(a: Mapping[str, Any], text: bool, image: bool) -> list[tuple[int, str, str]]:
    """(multiply-adds of the scores, modality of the queries, of the keys) of what is not blocked.

    text, image: of which queries.
    """
    (items, images, heads, width), shared = a["image_q"].shape, a["text_q"].dim() == 3
    texts = a["text_q"].shape[-3]
    counts = {"text": texts, "image": images}
    blocks = []
    for queries, wanted in (("text", text), ("image", image)):
        for keys in ("text", "image"):
            if wanted and a[f"bias_{queries[0]}{keys[0]}"] > -math.inf:
                times = 1 if shared and queries == keys == "text" else items
                size = times * counts[queries] * counts[keys] * heads * width
                blocks.append((size, queries, keys))
    return blocks


def _forward_flops(a: Mapping[str, Any]) -> int:
    outputs = a["outputs"]
    return 4 * sum(size for size, *_ in _blocks(a, bool(outputs & TEXT), bool(outputs & IMAGE)))


def _backward_flops(a: Mapping[str, Any]) -> int:
    names = [f"{modality}_{part}" for modality in ("text", "image") for part in "qkv"]
    needs = {name: bool(a["needs"] >> i & 1) for i, name in enumerate(names)}
    total = 0
    for size, queries, keys in _blocks(
        a, a["d_text_out"] is not None, a["d_image_out"] is not None
    ):
        q, k, v = needs[f"{queries}_q"], needs[f"{keys}_k"], needs[f"{keys}_v"]
        total += size * ((q or k or v) + (q or k) + q + k + v)
    return 2 * total


FLOPS: dict[str, Formula] = {
    "cross_modal_attention_forward": _forward_flops,
    "cross_modal_attention_backward": _backward_flops,
}


def define(library: torch.library.Library) -> None:
    """Declare the ops in ``library`` (schemas, fake kernels, autograd), without kernels."""
    namespace = library.ns

    def fake_forward(
        text_q: Tensor, text_k: Tensor, text_v: Tensor, image_q: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        *options, save = rest[2:]
        size = STATES[namespace, image_q.device.type] if save else None
        state = size(text_q, image_q, options) if size else 0
        return allocate_forward(text_q, image_q, options[-1], state)

    def fake_backward(
        d_text_out: Tensor | None, d_image_out: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        return allocate_gradients(rest[:6], rest[-1])

    fakes: dict[str, Callable[..., Any]] = {
        "cross_modal_attention_forward": fake_forward,
        "cross_modal_attention_backward": fake_backward,
    }
    schemas.define(library, SCHEMAS, fakes)
    ops = getattr(torch.ops, namespace)

    def backward(ctx: Any, needs: Sequence[bool], *given: Tensor | None) -> tuple[Any, ...]:
        op = ops.cross_modal_attention_backward.default
        return tuple(autograd.gradients(op, ctx, given, needs))

    autograd.register(library, "cross_modal_attention_forward", backward, results=2, saved_at=6)

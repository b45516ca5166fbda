"""The multi-modal adapter's head as a PyTorch operator: schemas, fake kernels, autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd, multimodal_state, schemas
from .codes import DTYPES
from .flops import Formula

PARAMETERS = (
    "down_weight",
    "down_bias",
    "down_weight_2",
    "down_bias_2",
    "in_weight",
    "in_bias",
    "out_weight",
    "out_bias",
    "up_weight",
    "up_bias",
    "up_weight_2",
    "up_bias_2",
    "blend",
    "logit_scale",
)
_OPTIONAL = ("down_weight_2", "down_bias_2", "up_weight_2", "up_bias_2", "blend", "logit_scale")
ADAPT_CODES = {"both": 0, "text": 1, "image": 2}

_TENSORS = ", ".join(f"Tensor{'?' * (name in _OPTIONAL)} {name}" for name in PARAMETERS)
# Without tensors for blend and logit_scale their values are the numbers here.
OPTIONS = (
    "float blend_value, float scale_value, int num_heads, float bias_tt, float bias_ti,"
    " float bias_it, float bias_ii, int adapt, int down_activation, int out_dtype"
)
_GRADIENTS = ", ".join(f"Tensor d_{name}" for name in ("text", "image", *PARAMETERS))

SCHEMAS = {
    "multimodal_logits_forward": f"(Tensor text, Tensor image, {_TENSORS}, {OPTIONS}, bool save)"
    " -> (Tensor logits, Tensor state)",
    "multimodal_logits_backward": "(Tensor d_logits, Tensor text, Tensor state, Tensor image,"
    f" {_TENSORS}, {OPTIONS}, int needs) -> ({_GRADIENTS})",
}

# How many fp32 numbers the forward keeps for backward, by namespace and device: a function of text,
# image, the parameters and the options by their names in the schema.
State = Callable[[Mapping[str, Any]], int]
STATES: dict[tuple[str, str], State] = {
    (schemas.TRITON, "cuda"): multimodal_state.size,
    (schemas.TRITON, "cpu"): multimodal_state.size,  # in simulators of a GPU
}
_NAMES = (
    "text",
    "image",
    *PARAMETERS,
    *(option.split()[1] for option in OPTIONS.split(", ")),
)


def _cpu_state(of: Mapping[str, Any]) -> int:
    """What csrc/cpu/multimodal/state.h lays out."""
    (c, d), b = of["text"].shape, of["image"].shape[0]
    e, heads = of["out_weight"].shape[0], of["num_heads"]
    hidden = 0 if of["down_weight_2"] is None else of["down_weight"].shape[0]
    r = e if of["up_weight_2"] is None else of["up_weight"].shape[0]
    rows = (c + b) * (hidden + 5 * e + heads)
    texts = c * (r + 2) + (r + 1) ** 2 + r
    size: int = rows + texts + b * (e + r + 2 * d + 3) + c * b
    return size


STATES[schemas.COMPILED, "cpu"] = _cpu_state


def _cuda_state(of: Mapping[str, Any]) -> int:
    """What csrc/cuda/multimodal/problem.cuh lays out, each piece on 16 bytes."""
    (c, d), b = of["text"].shape, of["image"].shape[0]
    e, heads = of["out_weight"].shape[0], of["num_heads"]
    hidden = 0 if of["down_weight_2"] is None else of["down_weight"].shape[0]
    r = e if of["up_weight_2"] is None else of["up_weight"].shape[0]
    rows, padded, form = c + b, (r + 7) // 8 * 8, (r + 1) * ((r + 7) // 8 * 8)
    pieces = (
        c, c, rows * hidden, rows * hidden, rows * e, rows * 3 * e, rows * e, heads * rows, b * e,
        r * e, r, 2 * (r + 1) ** 2, form, form + 1, c * padded, c, b * padded, b * padded,
        b * d, b * d, 3 * b, b * padded, b, c * heads * padded, b * heads * padded, heads * c * b,
        *[c * b] * 4, max(c, b) * padded, max(c, b) * padded,
    )  # fmt: skip
    return sum((piece + 3) // 4 * 4 for piece in pieces)


STATES[schemas.COMPILED, "cuda"] = _cuda_state


def allocate_forward(namespace: str, *inputs: Any) -> tuple[Tensor, Tensor]:
    """logits [B, C] and the state, empty if not to be saved, for the inputs of the forward."""
    *values, save = inputs
    of = dict(zip(_NAMES, values, strict=True))
    text, image = of["text"], of["image"]
    state = STATES[namespace, image.device.type](of) if save else 0
    return (
        image.new_empty((image.shape[0], text.shape[0]), dtype=DTYPES[of["out_dtype"]]),
        image.new_empty(state, dtype=torch.float32),
    )


def allocate_gradients(tensors: Sequence[Tensor | None], needs: int) -> tuple[Tensor, ...]:
    """A gradient for each tensor whose bit is set in ``needs``; empty tensors else.

    tensors: text, image and the parameters.
    """
    like: Any = tensors[0]
    return tuple(
        like.new_empty(0) if t is None or not needs >> i & 1 else t.new_empty(t.shape)
        for i, t in enumerate(tensors)
    )


def _multiply_adds(a: Mapping[str, Any]) -> tuple[int, int]:
    """Of the pairs of a text and an image, and of all else."""
    (texts, d), items = a["text"].shape, a["image"].shape[0]
    rows, width, heads = texts + items, a["out_weight"].shape[0], a["num_heads"]
    one_layer = a["up_weight_2"] is None
    r = width if one_layer else a["up_weight"].shape[0]
    adapts_text, adapts_image = (
        a["adapt"] != ADAPT_CODES["image"],
        a["adapt"] != ADAPT_CODES["text"],
    )
    sees = {name: a[f"bias_{name}"] > -math.inf for name in ("tt", "ti", "it", "ii")}

    down = sum(a[name].numel() for name in ("down_weight", "down_weight_2") if a[name] is not None)
    total = rows * (down + a["in_weight"].numel())
    total += 0 if one_layer else r * width * width  # the two layers behind the attention as one
    total += adapts_text * sees["tt"] * 2 * texts * texts * width
    total += adapts_image * sees["it"] * 2 * items * texts * width
    total += adapts_image * items * (width + d) * r
    pairs = texts * items * d
    if adapts_text:
        total += rows * (width + d) * r + d * r * r
        mixes = sees["tt"] and sees["ti"]
        pairs += texts * items * (width + 2 * heads * r + r * r + 2 * r if mixes else r)
    return pairs, total


def _forward_flops(a: Mapping[str, Any]) -> int:
    return 2 * sum(_multiply_adds(a))


def _backward_flops(a: Mapping[str, Any]) -> int:
    """Two products for each of the forward, and the pairs once more; what is not asked for too."""
    pairs, others = _multiply_adds(a)
    return 2 * (3 * pairs + 2 * others)


FLOPS: dict[str, Formula] = {
    "multimodal_logits_forward": _forward_flops,
    "multimodal_logits_backward": _backward_flops,
}


def define(library: torch.library.Library) -> None:
    """Declare the ops in ``library`` (schemas, fake kernels, autograd), without kernels."""
    namespace = library.ns

    def fake_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return allocate_forward(namespace, *inputs)

    def fake_backward(
        d_logits: Tensor, text: Tensor, state: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        return allocate_gradients((text, *rest[: 1 + len(PARAMETERS)]), rest[-1])

    fakes: dict[str, Callable[..., Any]] = {
        "multimodal_logits_forward": fake_forward,
        "multimodal_logits_backward": fake_backward,
    }
    schemas.define(library, SCHEMAS, fakes)
    ops = getattr(torch.ops, namespace)

    def backward(ctx: Any, needs: Sequence[bool], d_logits: Tensor) -> tuple[Any, ...]:
        op = ops.multimodal_logits_backward.default
        return tuple(autograd.gradients(op, ctx, (d_logits,), needs))

    autograd.register(library, "multimodal_logits_forward", backward)

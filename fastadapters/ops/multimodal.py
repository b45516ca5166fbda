"""The multi-modal adapter's head as a PyTorch operator: schemas, fake kernels, autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd, schemas
from .codes import DTYPES

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
STATES: dict[tuple[str, str], State] = {}
_NAMES = (
    "text",
    "image",
    *PARAMETERS,
    *(option.split()[1] for option in OPTIONS.split(", ")),
)


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

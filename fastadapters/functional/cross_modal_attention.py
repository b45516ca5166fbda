"""Attention over the text and the image tokens of each item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args, overload

from torch import Tensor
from torch.fx import Proxy

from .. import backends
from ..checks import (
    check_activations,
    check_bias,
    check_choice,
    check_floats,
    check_number,
    check_tensor,
)
from ..ops import NAMESPACES, autograd
from ..ops.cross_modal_attention import IMAGE, TEXT
from ..options import Outputs
from ..reference.cross_modal_attention import MASKED, Bias
from .arguments import PLAIN, compute_dtype, leaf, owned, saves, without_autocast
from .shards import on_shards


def _sees_one_key(bias: Sequence[float], keys: tuple[int, int]) -> bool:
    """Whether these queries see a single key, whose value is the result: perhaps that very memory.

    bias: what is added for text and for image keys; ``keys``: how many there are of each.
    """
    return [n for n, b in zip(keys, bias, strict=True) if b > -math.inf] == [1]


def _per_item(text_q: object) -> tuple[str, ...]:
    """The names of the arguments that have a leading B."""
    images, texts = ("image_q", "image_k", "image_v"), ("text_q", "text_k", "text_v")
    return images + texts if isinstance(text_q, Tensor) and text_q.dim() == 4 else images


@overload
def cross_modal_attention(
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_q: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    *,
    bias: Bias = MASKED,
    scale: float | None = None,
    outputs: Literal["both"] = "both",
) -> tuple[Tensor, Tensor]: ...


@overload
def cross_modal_attention(
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_q: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    *,
    bias: Bias = MASKED,
    scale: float | None = None,
    outputs: Literal["text", "image"],
) -> Tensor: ...


def cross_modal_attention(
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_q: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    *,
    bias: Bias = MASKED,
    scale: float | None = None,
    outputs: Outputs = "both",
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head attention over the text and the image tokens of each item (arXiv 2409.02958).

        score(q, k) = q.k * scale + bias[modality of q][modality of k]

    An item's sequence is its C text tokens and its I image tokens. No mask is ever built.

    Args:
        text_q, text_k, text_v: [C, H, d], shared by all items (class names), or [B, C, H, d].
        image_q, image_k, image_v: [B, I, H, d]; their dtype is the op's. C, I, H, d >= 1, B >= 0.
        bias: ((text-text, text-image), (image-text, image-image)); -inf blocks. The default lets
            each modality see only the other (the paper's mask); ((0, 1), (1, 0)) is what the
            published code computes, whose float mask is added. A query that sees no key gives 0.
        scale: of q.k; d ** -0.5 if None.
        outputs: "both", or "text" or "image" to compute only that one.

    Returns:
        text_out [B, C, H, d], image_out [B, I, H, d], or the one asked for, in the compute dtype.

    Raises:
        TypeError, ValueError: naming the argument, the shape expected and the shape given.
        RuntimeError: a backend chosen by name cannot run.

    Examples:
        >>> import torch
        >>> text = torch.randn(3, 100, 4, 32)  # queries, keys and values of 100 classes, 4 heads
        >>> image = torch.randn(3, 8, 1, 4, 32)  # of 8 items with a token each
        >>> text_out, image_out = cross_modal_attention(*text, *image)
        >>> text_out.shape, image_out.shape
        (torch.Size([8, 100, 4, 32]), torch.Size([8, 1, 4, 32]))
        >>> cross_modal_attention(*text, *image, outputs="image").shape
        torch.Size([8, 1, 4, 32])
    """
    if isinstance(image_q, Proxy):
        return leaf(cross_modal_attention, locals())
    sharded = (
        None
        if type(image_q) in backends.PLAIN_TYPES
        else on_shards(cross_modal_attention, locals(), _per_item(text_q), 3)
    )
    if sharded is not None and not isinstance(sharded, str):
        return sharded
    check_activations("image_q", image_q, "[B, I, H, d]", 4)
    device = image_q.device
    n_items, *shared = image_q.shape
    for name, tensor in (("image_k", image_k), ("image_v", image_v)):
        check_tensor(name, tensor, "[B, I, H, d]", tuple(image_q.shape), device)
    check_floats("text_q", text_q, "[C, H, d]")
    if text_q.dim() not in (3, 4) or text_q.shape[-3] == 0:
        raise ValueError(
            f"text_q: expected [C, H, d] or [B, C, H, d] with C >= 1, got {list(text_q.shape)}"
        )
    symbols = "[C, H, d]" if text_q.dim() == 3 else "[B, C, H, d]"
    shape = (n_items,) * (text_q.dim() - 3) + (text_q.shape[-3], *shared[1:])
    for name, tensor in (("text_q", text_q), ("text_k", text_k), ("text_v", text_v)):
        check_tensor(name, tensor, symbols, shape, device)
    bias = check_bias("bias", bias)
    check_choice("outputs", outputs, get_args(Outputs))
    if scale is not None:
        scale = check_number("scale", scale, " or None")

    dtype = compute_dtype(image_q)
    given = (text_q, text_k, text_v, image_q, image_k, image_v)
    _, heads, width = shared
    problem = backends.Problem(heads * width, width, dtype, dtype, given, sharded)
    name = backends.resolve("cross_modal_attention", image_q, problem)
    tensors = tuple(t.to(dtype) for t in given)
    if name not in PLAIN:
        scale = width**-0.5 if scale is None else scale
        return attend(name, tensors, bias, scale, outputs)
    with without_autocast(image_q):
        out = PLAIN[name].cross_modal_attention(*tensors, bias=bias, scale=scale, outputs=outputs)
    outs = [
        owned(t, alias=_sees_one_key(row, (text_q.shape[-3], image_q.shape[1])))
        for t, row in zip(
            out if outputs == "both" else (out,),
            bias if outputs == "both" else (bias[outputs == "image"],),
            strict=True,
        )
    ]
    return (outs[0], outs[1]) if outputs == "both" else outs[0]


def attend(
    name: str, tensors: Sequence[Tensor], bias: Bias, scale: float, outputs: Outputs
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-modal attention by the kernels of backend ``name``, on tensors of one dtype."""
    which = {"text": TEXT, "image": IMAGE, "both": TEXT | IMAGE}[outputs]
    text_out, image_out = autograd.call(
        NAMESPACES[name].cross_modal_attention_forward.default,
        [t if t.stride(-1) == 1 else t.contiguous() for t in tensors],
        (scale, *bias[0], *bias[1], which, saves(tensors)),
        results=2,
    )
    if outputs == "both":
        return text_out, image_out
    out: Tensor = text_out if outputs == "text" else image_out
    return out

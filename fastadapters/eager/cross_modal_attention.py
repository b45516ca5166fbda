"""Attention across modalities, with what no item changes computed once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import transformed
from ..options import Outputs
from ..reference.cross_modal_attention import MASKED, Bias

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q.k of every query and key in fp32 or more: [H, Q, K], [B, H, Q, K] if either is per item."""
    bq, bk = "b" * (q.dim() - 3), "b" * (k.dim() - 3)
    scores = torch.einsum(f"{bq}qhd,{bk}khd->{bq or bk}hqk", q, k)
    return scores.float() if scores.dtype in _LOW_PRECISION else scores


def _average(weights: Tensor, v: Tensor) -> Tensor:
    """[(B,) H, Q, K] weights times [(B,) K, H, d] values, giving [(B,) H, Q, d]."""
    b, bv = "b" * (weights.dim() - 3), "b" * (v.dim() - 3)
    return torch.einsum(f"{b}hqk,{bv}khd->{b or bv}hqd", weights.to(v.dtype), v)


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over one modality's keys [(B,) H, Q, d], log-sum-exp of its scores [(B,) H, Q, 1].

    Over a single key attention is its value, whatever the query.
    """
    scores = _scores(q, k)
    if k.shape[-3] == 1:
        return v.transpose(-2, -3), scores
    top = scores.detach().amax(dim=-1, keepdim=True)  # cancels, so it needs no gradient
    below = scores - top
    weights = below.exp() if transformed() else below.exp_()
    total = weights.sum(dim=-1, keepdim=True)
    return _average(weights, v) / total.to(v.dtype), total.log() + top


def attend_both(
    q: Tensor, text: tuple[Tensor, Tensor], image: tuple[Tensor, Tensor], bias: Sequence[float]
) -> Tensor:
    """Attention of one modality's queries over both: [B or 1, Q or 1, H, d], 1 where all are equal.

    A constant per modality moves no weight inside it: it only shifts the log-odds between the two.
    Heads stay in front until the end, so that backward sums over items along one memory layout:
    mixing two costs a transposition, and torch.compile on the CPU miscompiles it (pytorch#196681).
    """
    visible = [kv for kv, b in zip((text, image), bias, strict=True) if b > -math.inf]
    if len(visible) == 2:
        (text_out, text_lse), (image_out, image_lse) = (attend(q, *kv) for kv in visible)
        weight = torch.sigmoid(image_lse - text_lse + (bias[1] - bias[0]))
        out = torch.lerp(text_out, image_out, weight.to(text_out.dtype))
    elif len(visible) == 1:
        k, v = visible[0]
        single = k.shape[-3] == 1
        out = v.transpose(-2, -3) if single else _average(_scores(q, k).softmax(dim=-1), v)
    else:
        zero = torch.where(torch.zeros((), dtype=torch.bool, device=q.device), q, 0.0)
        out = zero.transpose(-2, -3)
    out = out.transpose(-2, -3)
    return out if out.dim() == 4 else out[None]


def differentiable(out: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """out, with gradients of 0 where it depends on none of the ``inputs`` that need one."""
    if torch.is_grad_enabled() and not out.requires_grad:
        for t in inputs:
            if t.requires_grad:
                nothing = torch.zeros((), dtype=torch.bool, device=t.device)
                out = out + torch.where(nothing, t, 0.0).sum()
    return out


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
    """Same arguments and result as `fastadapters.reference.cross_modal_attention`.

    Attention over the texts and over the images is computed apart and merged by log-sum-exp, so
    that what does not depend on the item (texts over texts) is computed once. An output that is
    the same for many queries (texts that see one image) is an expanded view.
    """
    inputs = (text_q, text_k, text_v, image_q, image_k, image_v)
    scale = text_q.shape[-1] ** -0.5 if scale is None else scale
    text, image = (text_k, text_v), (image_k, image_v)
    results = []
    if outputs != "image":
        out = attend_both(text_q * scale, text, image, bias[0])
        out = differentiable(out, inputs)
        results.append(out.expand(image_q.shape[0], *text_q.shape[-3:]))
    if outputs != "text":
        out = attend_both(image_q * scale, text, image, bias[1])
        results.append(differentiable(out, inputs).expand_as(image_q))
    return (results[0], results[1]) if outputs == "both" else results[0]

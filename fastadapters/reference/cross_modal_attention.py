"""Attention across modalities, as its definition."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..options import Outputs

Bias = Sequence[Sequence[float]]
MASKED: Bias = ((-math.inf, 0.0), (0.0, -math.inf))


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
    """softmax(q k^T * scale + mask) v over the C texts and I images of each item.

    The mask [C + I, C + I] holds bias[modality of q][modality of k], text before image. A query
    that sees no key gives 0. All tensors have one dtype; shapes as `functional`.
    """
    n_items, n_texts = image_q.shape[0], text_q.shape[-3]
    scale = text_q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (
        torch.cat([text.expand(n_items, -1, -1, -1), image], dim=1)
        for text, image in ((text_q, image_q), (text_k, image_k), (text_v, image_v))
    )
    modality = (torch.arange(q.shape[1], device=q.device) >= n_texts).long()
    mask = torch.tensor(bias, dtype=q.dtype, device=q.device)[modality[:, None], modality]
    sees = (mask > -math.inf).any(dim=1, keepdim=True)

    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale + mask
    # A row of -inf would give NaN, forward and backward: it leaves before the softmax.
    weights = torch.where(sees, torch.softmax(torch.where(sees, scores, 0.0), dim=-1), 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    text_out, image_out = out[:, :n_texts], out[:, n_texts:]
    if outputs == "both":
        return text_out, image_out
    return text_out if outputs == "text" else image_out

"""Attention across modalities and the adapter head built on it, as their definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .bottleneck import ACTIVATIONS

Layer = tuple[Tensor, Tensor]  # weight [out, in], bias [out]
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
    outputs: str = "both",
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


def mlp(x: Tensor, layers: Sequence[Layer], activation: str) -> Tensor:
    """One or more linear layers with the activation between them."""
    for i, (weight, bias) in enumerate(layers):
        x = F.linear(x if i == 0 else ACTIVATIONS[activation](x), weight, bias)
    return x


def multimodal_features(
    text: Tensor,
    image: Tensor,
    down: Sequence[Layer],
    in_proj: Layer,
    out_proj: Layer,
    up: Sequence[Layer],
    *,
    num_heads: int,
    bias: Bias = MASKED,
    down_activation: str = "identity",
) -> tuple[Tensor, Tensor]:
    """Down-sampler, multi-head attention over [texts ; image] of each item, up-sampler."""
    tokens = torch.cat([text.expand(image.shape[0], -1, -1), image[:, None]], dim=1)
    x = mlp(tokens, down, down_activation)
    q, k, v = F.linear(x, *in_proj).unflatten(-1, (3, num_heads, -1)).unbind(dim=2)
    text_part, image_part = slice(None, -1), slice(-1, None)
    text_out, image_out = cross_modal_attention(
        *(t[:, text_part] for t in (q, k, v)), *(t[:, image_part] for t in (q, k, v)), bias=bias
    )
    out = F.linear(torch.cat([text_out, image_out], dim=1).flatten(-2), *out_proj)
    out = mlp(out, up, "gelu")
    return out[:, text_part], out[:, -1]


def multimodal_logits(
    text: Tensor,
    image: Tensor,
    down: Sequence[Layer],
    in_proj: Layer,
    out_proj: Layer,
    up: Sequence[Layer],
    *,
    num_heads: int,
    logit_scale: float | Tensor,
    bias: Bias = MASKED,
    blend: float | Tensor = 0.2,
    adapt: str = "both",
    down_activation: str = "identity",
) -> Tensor:
    """logit_scale * cosine of each item's image with each text, both blended with the adapter's."""
    features = multimodal_features(
        text, image, down, in_proj, out_proj, up,
        num_heads=num_heads, bias=bias, down_activation=down_activation,
    )  # fmt: skip
    return blended_logits(text, image, *features, logit_scale=logit_scale, blend=blend, adapt=adapt)


def blended_logits(
    text: Tensor,
    image: Tensor,
    new_text: Tensor,
    new_image: Tensor,
    *,
    logit_scale: float | Tensor,
    blend: float | Tensor,
    adapt: str,
) -> Tensor:
    """Logits of text [C, D] and image [B, D] and what the adapter makes of them.

    Published models differ in one detail: the one that adapts only the image blends the image
    feature as it comes, the others blend unit vectors.
    """
    text = F.normalize(text, dim=-1).expand_as(new_text)
    if adapt != "image":
        image = F.normalize(image, dim=-1)
        text = F.normalize(blend * F.normalize(new_text, dim=-1) + (1 - blend) * text, dim=-1)
    if adapt != "text":
        image = blend * F.normalize(new_image, dim=-1) + (1 - blend) * image
    return logit_scale * torch.einsum("bd,bcd->bc", F.normalize(image, dim=-1), text)

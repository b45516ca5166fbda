"""The Multi-Modal Adapter's features and logits, as their definitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import Activation, Adapt
from .bottleneck import ACTIVATIONS
from .cross_modal_attention import MASKED, Bias, cross_modal_attention

Layer = tuple[Tensor, Tensor]  # weight [out, in], bias [out]


class MultiModalLayers(NamedTuple):
    """The layers of a multi-modal adapter, each a pair (weight [out, in], bias [out]).

    D is the width of the features, E that of the attention, R a hidden width.

    Examples:
        >>> def layer(width, *out):
        ...     return torch.randn(*out, width), torch.zeros(*out)
        >>> down, up = [layer(512, 128)], [layer(128, 32), layer(32, 512)]
        >>> layers = MultiModalLayers(down, layer(128, 384), layer(128, 128), up)
        >>> [list(weight.shape) for weight, _ in layers.up]
        [[32, 128], [512, 32]]
    """

    down: Sequence[Layer]
    """one layer D -> E, or two, D -> R -> E"""
    in_proj: Layer
    """queries, keys and values, E -> 3 E, as in `torch.nn.MultiheadAttention`"""
    out_proj: Layer
    """E -> E"""
    up: Sequence[Layer]
    """one layer E -> D, or two with a GELU between, E -> R -> D"""


def mlp(x: Tensor, layers: Sequence[Layer], activation: Activation) -> Tensor:
    """One or more linear layers with the activation between them."""
    for i, (weight, bias) in enumerate(layers):
        x = F.linear(x if i == 0 else ACTIVATIONS[activation](x), weight, bias)
    return x


def multimodal_features(
    text: Tensor,
    image: Tensor,
    layers: MultiModalLayers,
    *,
    num_heads: int,
    bias: Bias = MASKED,
    down_activation: Activation = "identity",
) -> tuple[Tensor, Tensor]:
    """Down-sampler, multi-head attention over [texts ; image] of each item, up-sampler."""
    tokens = torch.cat([text.expand(image.shape[0], -1, -1), image[:, None]], dim=1)
    x = mlp(tokens, layers.down, down_activation)
    q, k, v = F.linear(x, *layers.in_proj).unflatten(-1, (3, num_heads, -1)).unbind(dim=2)
    text_part, image_part = slice(None, -1), slice(-1, None)
    text_out, image_out = cross_modal_attention(
        *(t[:, text_part] for t in (q, k, v)), *(t[:, image_part] for t in (q, k, v)), bias=bias
    )
    out = F.linear(torch.cat([text_out, image_out], dim=1).flatten(-2), *layers.out_proj)
    out = mlp(out, layers.up, "gelu")
    return out[:, text_part], out[:, -1]


def multimodal_logits(
    text: Tensor,
    image: Tensor,
    layers: MultiModalLayers,
    *,
    num_heads: int,
    logit_scale: float | Tensor,
    bias: Bias = MASKED,
    blend: float | Tensor = 0.2,
    adapt: Adapt = "both",
    down_activation: Activation = "identity",
) -> Tensor:
    """logit_scale * cosine of each item's image with each text, both blended with the adapter's."""
    features = multimodal_features(
        text, image, layers, num_heads=num_heads, bias=bias, down_activation=down_activation
    )
    return blended_logits(text, image, *features, logit_scale=logit_scale, blend=blend, adapt=adapt)


def blended_logits(
    text: Tensor,
    image: Tensor,
    new_text: Tensor,
    new_image: Tensor,
    *,
    logit_scale: float | Tensor,
    blend: float | Tensor,
    adapt: Adapt,
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

"""The Multi-Modal Adapter's features and logits, with what no item changes computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import Activation, Adapt
from ..reference.bottleneck import ACTIVATIONS
from ..reference.cross_modal_attention import MASKED, Bias
from ..reference.multimodal import Layer, MultiModalLayers, mlp
from .cross_modal_attention import attend, attend_both, cross_modal_attention


def _compose(outer: Layer, inner: Layer) -> Layer:
    """The one linear layer that does what ``outer`` after ``inner`` does."""
    return outer[0] @ inner[0], F.linear(inner[1], *outer)


def _project(x: Tensor, in_proj: Layer, part: int, num_heads: int) -> Tensor:
    """Queries (part 0), keys (1) or values (2) of tokens x [..., E]: [..., H, E / H]."""
    weight, bias = (t.chunk(3)[part] for t in in_proj)
    projected: Tensor = F.linear(x, weight, bias).unflatten(-1, (num_heads, -1))
    return projected


def multimodal_features(
    text: Tensor,
    image: Tensor,
    layers: MultiModalLayers,
    *,
    num_heads: int,
    bias: Bias = MASKED,
    down_activation: Activation = "identity",
    attention: Callable[..., Any] = cross_modal_attention,
) -> tuple[Tensor, Tensor]:
    """Same arguments and result as `fastadapters.reference.multimodal_features`.

    attention: what computes `cross_modal_attention`.
    """
    down, in_proj, out_proj, up = layers
    n_texts = text.shape[-2]
    tokens = [mlp(x, down, down_activation) for x in (text, image[:, None])]
    text_qkv, image_qkv = (
        F.linear(x, *in_proj).unflatten(-1, (3, num_heads, -1)).unbind(-3) for x in tokens
    )
    if bias[0][0] == -math.inf:  # an item's texts see at most its one image: all get the same
        first = text_qkv[0].narrow(-3, 0, 1)
        text_out = attend_both(
            first, (text_qkv[1], text_qkv[2]), (image_qkv[1], image_qkv[2]), bias[0]
        )
        image_out = attention(*text_qkv, *image_qkv, bias=bias, outputs="image")
    else:
        text_out, image_out = attention(*text_qkv, *image_qkv, bias=bias, outputs="both")
    up = [_compose(up[0], out_proj), *up[1:]]
    text_out, image_out = (mlp(out.flatten(-2), up, "gelu") for out in (text_out, image_out))
    return text_out.expand(image.shape[0], n_texts, -1), image_out[:, 0]


def _merged_hidden(
    q: Tensor,
    text: tuple[Tensor, Tensor],
    image: tuple[Tensor, Tensor],
    bias: Sequence[float],
    layer: Layer,
) -> Tensor:
    """``layer`` applied to the attention of every text over all texts and one image: [C, B, R].

    The layer is applied head by head to what depends on the text alone and on the image alone;
    only their mixture is as large as [C, B, R].
    """
    text_out, text_lse = attend(q, *text)
    # The image's log-odds against the texts in one product, the texts' part as one more feature.
    own = torch.cat([q, (bias[1] - bias[0] - text_lse).transpose(0, 1)], dim=-1)
    odds = torch.einsum("chd,bhd->hcb", own, F.pad(image[0][:, 0], (0, 1), value=1.0))
    n_heads = q.shape[-2]
    heads = layer[0].unflatten(1, (n_heads, -1))
    share = layer[1] / n_heads  # a head's two weights sum to one: its share of the constant fits in
    from_text = torch.einsum("hcd,rhd->chr", text_out, heads) + share
    from_image = torch.einsum("bhd,rhd->bhr", image[1][:, 0], heads) + share
    mixed = torch.einsum("hcb,bhr->cbr", torch.sigmoid(odds), from_image)
    return torch.baddbmm(mixed, torch.sigmoid(-odds).permute(1, 2, 0), from_text)


def _length_square(e: Tensor, weight: Tensor, constant: Tensor) -> Tensor:
    """|weight e + constant|^2 for e [..., R].

    Its value is that of |L (e ; 1)|^2, L^T L = (weight | constant)^T (weight | constant): where the
    two terms nearly cancel, the quadratic form in e that it equals has lost its digits, and may be
    negative. What is lost there is the value alone, so that form gives the gradient.
    """
    last = torch.cat([weight, constant[:, None]], dim=1)
    gram = (wide := last.detach().double()).T @ wide
    noise = 1e-13 * gram.diagonal().amax() + 1e-60  # what depends on other columns stays positive
    factor = torch.linalg.cholesky_ex(
        gram + noise * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), upper=True
    ).L.to(e.dtype)
    form = F.linear(e.detach(), factor[:, :-1], factor[:, -1])
    quadratic = ((e @ (weight.T @ weight) + 2 * (constant @ weight)) * e).sum(dim=-1)
    quadratic = quadratic + constant @ constant
    return form.square().sum(dim=-1) + (quadratic - quadratic.detach())


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
    """Same arguments and result as `fastadapters.reference.multimodal_logits`.

    No tensor here is as large as [B, C, D]. Up to the up-sampler's activation the adapter is linear
    in the attention outputs, and those are mixtures of what the texts give and what the image
    gives. Behind it an output is u = W e + c with e [C, B, R], needed only through |u|^2, t.u and
    i.u: a quadratic and two linear forms in e.
    """
    down, in_proj, out_proj, up = layers
    inner = out_proj if len(up) == 1 else _compose(up[0], out_proj)
    activation = ACTIVATIONS["identity" if len(up) == 1 else "gelu"]
    weight, constant = up[-1]

    x_text, x_image = (mlp(x, down, down_activation) for x in (text, image[:, None]))
    text_kv, image_kv = (
        (_project(x, in_proj, 1, num_heads), _project(x, in_proj, 2, num_heads))
        for x in (x_text, x_image)
    )
    scale = text_kv[0].shape[-1] ** -0.5
    text = F.normalize(text, dim=-1)
    image = image if adapt == "image" else F.normalize(image, dim=-1)
    if adapt != "text":
        q = _project(x_image, in_proj, 0, num_heads) * scale
        out = attend_both(q, text_kv, image_kv, bias[1])[:, 0].flatten(-2)
        new_image = F.linear(activation(F.linear(out, *inner)), weight, constant)
        image = blend * F.normalize(new_image, dim=-1) + (1 - blend) * image
    image = F.normalize(image, dim=-1)
    similarity = text @ image.T  # [C, B], as everything below
    if adapt == "image":
        return logit_scale * similarity.T

    q = _project(x_text, in_proj, 0, num_heads) * scale
    if -math.inf in bias[0]:
        out = attend_both(q, text_kv, image_kv, bias[0]).flatten(-2)
        hidden = F.linear(out, *inner).transpose(0, 1)
    else:
        hidden = _merged_hidden(q, text_kv, image_kv, bias[0], inner)
    e = activation(hidden)  # [C or 1, B or 1, R]
    # Where u = W e + c is small because the terms cancel for every e, e is nearly the same
    # everywhere: near to what the mean of the texts' values gives, as attention over them nearly
    # does and no item changes, both terms are small.
    mean = text_kv[1].detach().mean(dim=0).flatten()
    center = activation(F.linear(mean, *inner)).detach().nan_to_num(0, 0, 0)
    e = e - center
    constant = constant + F.linear(center.double(), weight.double()).to(e.dtype)
    square = _length_square(e, weight, constant)
    text_dot = torch.einsum("cr,cbr->cb", text @ weight, e) + (text @ constant)[:, None]
    image_dot = torch.linalg.vecdot(e, image @ weight) + image @ constant
    # F.normalize's floor of 1e-12 on a length, squared.
    inverse = square.clamp_min(1e-24).rsqrt()
    mixed_square = (
        blend**2 * square * inverse**2
        + (1 - blend) ** 2 * text.square().sum(dim=-1, keepdim=True)  # 1, or 0 for a row of zeros
        + 2 * blend * (1 - blend) * text_dot * inverse
    )
    cosine = blend * image_dot * inverse + (1 - blend) * similarity
    logits: Tensor = logit_scale * cosine * mixed_square.clamp_min(1e-24).rsqrt()
    return logits.T

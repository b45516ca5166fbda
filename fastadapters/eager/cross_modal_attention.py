"""Attention across modalities and the adapter head, with what no item changes computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.bottleneck import ACTIVATIONS
from ..reference.cross_modal_attention import MASKED, Bias, Layer, mlp

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


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over one modality's keys [(B,) H, Q, d], log-sum-exp of its scores [(B,) H, Q, 1].

    Over a single key attention is its value, whatever the query.
    """
    scores = _scores(q, k)
    if k.shape[-3] == 1:
        return v.transpose(-2, -3), scores
    top = scores.detach().amax(dim=-1, keepdim=True)  # cancels, so it needs no gradient
    weights = (scores - top).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    return _average(weights, v) / total.to(v.dtype), total.log() + top


def _attend_both(
    q: Tensor, text: tuple[Tensor, Tensor], image: tuple[Tensor, Tensor], bias: Sequence[float]
) -> Tensor:
    """Attention of one modality's queries over both: [B or 1, Q or 1, H, d], 1 where all are equal.

    A constant per modality moves no weight inside it: it only shifts the log-odds between the two.
    Heads stay in front until the end, so that backward sums over items along one memory layout:
    mixing two costs a transposition, and torch.compile on the CPU miscompiles it (pytorch#196681).
    """
    visible = [kv for kv, b in zip((text, image), bias, strict=True) if b > -math.inf]
    if len(visible) == 2:
        (text_out, text_lse), (image_out, image_lse) = (_attend(q, *kv) for kv in visible)
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
    """Same arguments and result as `fastadapters.reference.cross_modal_attention`.

    Attention over the texts and over the images is computed apart and merged by log-sum-exp, so
    that what does not depend on the item (texts over texts) is computed once. An output that is
    the same for many queries (texts that see one image) is an expanded view.
    """
    scale = text_q.shape[-1] ** -0.5 if scale is None else scale
    text, image = (text_k, text_v), (image_k, image_v)
    results = []
    if outputs != "image":
        out = _attend_both(text_q * scale, text, image, bias[0])
        results.append(out.expand(image_q.shape[0], *text_q.shape[-3:]))
    if outputs != "text":
        out = _attend_both(image_q * scale, text, image, bias[1])
        results.append(out.expand_as(image_q))
    return (results[0], results[1]) if outputs == "both" else results[0]


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
    down: Sequence[Layer],
    in_proj: Layer,
    out_proj: Layer,
    up: Sequence[Layer],
    *,
    num_heads: int,
    bias: Bias = MASKED,
    down_activation: str = "identity",
    attention: Callable[..., Any] = cross_modal_attention,
) -> tuple[Tensor, Tensor]:
    """Same arguments and result as `fastadapters.reference.multimodal_features`.

    attention: what computes `cross_modal_attention`.
    """
    n_texts = text.shape[-2]
    tokens = [mlp(x, down, down_activation) for x in (text, image[:, None])]
    text_qkv, image_qkv = ([_project(x, in_proj, i, num_heads) for i in range(3)] for x in tokens)
    if bias[0][0] == -math.inf:  # an item's texts see at most its one image: all get the same
        first = text_qkv[0].narrow(-3, 0, 1)
        text_out = _attend_both(
            first, (text_qkv[1], text_qkv[2]), (image_qkv[1], image_qkv[2]), bias[0]
        )
        image_out = attention(*text_qkv, *image_qkv, bias=bias, outputs="image")
    else:
        text_out, image_out = attention(*text_qkv, *image_qkv, bias=bias, outputs="both")
    up = [_compose(up[0], out_proj), *up[1:]]
    text_out, image_out = (mlp(out.flatten(-2), up, "gelu") for out in (text_out, image_out))
    return text_out.expand(-1, n_texts, -1), image_out[:, 0]


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
    text_out, text_lse = _attend(q, *text)
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
    """Same arguments and result as `fastadapters.reference.multimodal_logits`.

    No tensor here is as large as [B, C, D]. Up to the up-sampler's activation the adapter is linear
    in the attention outputs, and those are mixtures of what the texts give and what the image
    gives. Behind it an output is u = W e + c with e [C, B, R], needed only through |u|^2, t.u and
    i.u: a quadratic and two linear forms in e. 16-bit features are widened to fp32, as the Gram
    matrix W^T W wants it; next to the model that made them they are small.
    """
    dtype = image.dtype
    if dtype in _LOW_PRECISION:
        text, image = text.float(), image.float()
        down, up = ([(w.float(), b.float()) for w, b in layers] for layers in (down, up))
        in_proj, out_proj = ((w.float(), b.float()) for w, b in (in_proj, out_proj))
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
        out = _attend_both(q, text_kv, image_kv, bias[1])[:, 0].flatten(-2)
        new_image = F.linear(activation(F.linear(out, *inner)), weight, constant)
        image = blend * F.normalize(new_image, dim=-1) + (1 - blend) * image
    image = F.normalize(image, dim=-1)
    similarity = text @ image.T  # [C, B], as everything below
    if adapt == "image":
        return (logit_scale * similarity.T).to(dtype)

    q = _project(x_text, in_proj, 0, num_heads) * scale
    if -math.inf in bias[0]:
        out = _attend_both(q, text_kv, image_kv, bias[0]).flatten(-2)
        hidden = F.linear(out, *inner).transpose(0, 1)
    else:
        hidden = _merged_hidden(q, text_kv, image_kv, bias[0], inner)
    e = activation(hidden)  # [C or 1, B or 1, R]
    gram = (e @ (weight.T @ weight) + 2 * (constant @ weight)) * e
    square = gram.sum(dim=-1) + constant @ constant
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
    return logits.T.to(dtype)

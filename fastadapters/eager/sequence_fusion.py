"""Low-rank fusion in plain matrix products, the cheaper order of the two first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import cast

import torch
from torch import Tensor

from ..options import Activation, Fusion
from ..reference.bottleneck import ACTIVATIONS
from ..reference.sequence_fusion import counted


def _factor(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    time_factor: Tensor,
    feature_factor: Tensor,
    activation: Activation,
    length: Tensor | None,
) -> list[Tensor]:
    """A^T act(x Wd^T + b) U of one modality: R tensors [B, T_o, D].

    Features lead in h [r, B T]: so no product needs a transposed copy. Combining the tokens first
    never builds [B, T, D]; only where tokens are fewer than r and T_o is the other order less work.
    """
    rank, n_tokens, out_len = time_factor.shape
    width, n_items = down_weight.shape[0], x.shape[0]
    mask = None if length is None else counted(n_tokens, length)
    rows = (x if mask is None else torch.where(mask, x, 0.0)).flatten(0, 1).T
    z = down_weight @ rows if down_bias is None else down_bias[:, None].addmm(down_weight, rows)
    h = ACTIVATIONS[activation](z)
    if mask is not None:
        h = torch.where(mask.flatten(), h, 0.0)
    if n_tokens * (width + out_len) < width * out_len:
        expanded = [(h.T @ u).unflatten(0, (n_items, n_tokens)) for u in feature_factor.unbind()]
        return [
            torch.einsum("to,btd->bod", a, e)
            for a, e in zip(time_factor.unbind(), expanded, strict=True)
        ]
    combined = h.view(width * n_items, n_tokens) @ time_factor.transpose(0, 1).flatten(1)
    return [
        (p.flatten(1).T @ u).unflatten(0, (n_items, out_len))
        for p, u in zip(
            combined.view(width, n_items, rank, out_len).unbind(2),
            feature_factor.unbind(),
            strict=True,
        )
    ]


def sequence_fusion(
    inputs: Sequence[Tensor],
    down_weights: Sequence[Tensor],
    down_biases: Sequence[Tensor | None],
    time_factors: Sequence[Tensor],
    feature_factors: Sequence[Tensor],
    *,
    activation: Activation = "gelu",
    residual: Tensor | None = None,
    lengths: Tensor | None = None,
    fusion: Fusion = "cp",
) -> Tensor:
    """Same arguments and result as `fastadapters.reference.sequence_fusion`."""
    factors = []
    for i, (x, weight, bias, time_factor, feature_factor) in enumerate(
        zip(inputs, down_weights, down_biases, time_factors, feature_factors, strict=True)
    ):
        time_factor = time_factor[:, : x.shape[1]]
        if fusion == "summed":
            time_factor = time_factor.sum(dim=0, keepdim=True)
            feature_factor = feature_factor.sum(dim=0, keepdim=True)
        length = None if lengths is None else lengths[i]
        factors.append(_factor(x, weight, bias, time_factor, feature_factor, activation, length))
    same_dtype = residual is None or residual.dtype == inputs[0].dtype
    y = residual if same_dtype else None
    for terms in zip(*factors, strict=True):
        *others, last = terms
        if y is None:
            y = reduce(torch.mul, terms)
        elif others:
            y = torch.addcmul(y, reduce(torch.mul, others), last)
        else:
            y = y + last
    return cast(Tensor, y) if same_dtype else cast(Tensor, residual) + cast(Tensor, y)

"""Low-rank fusion in plain matrix products, the cheaper order of the two first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import cast

import torch
from torch import Tensor

from ..reference.bottleneck import ACTIVATIONS


def _factor(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    time_factor: Tensor,
    feature_factor: Tensor,
    activation: str,
) -> list[Tensor]:
    """A^T act(x Wd^T + b) U of one modality: R tensors [B, T_o, D].

    Features lead in h [r, B T]: so no product needs a transposed copy. Combining the tokens first
    never builds [B, T, D]; only where tokens are fewer than r and T_o is the other order less work.
    """
    rank, n_tokens, length = time_factor.shape
    width, n_items = down_weight.shape[0], x.shape[0]
    rows = x.flatten(0, 1).T
    z = down_weight @ rows if down_bias is None else down_bias[:, None].addmm(down_weight, rows)
    h = ACTIVATIONS[activation](z)
    if n_tokens * (width + length) < width * length:
        expanded = [(h.T @ u).unflatten(0, (n_items, n_tokens)) for u in feature_factor.unbind()]
        return [
            torch.einsum("to,btd->bod", a, e)
            for a, e in zip(time_factor.unbind(), expanded, strict=True)
        ]
    combined = h.view(width * n_items, n_tokens) @ time_factor.transpose(0, 1).flatten(1)
    return [
        (p.flatten(1).T @ u).unflatten(0, (n_items, length))
        for p, u in zip(
            combined.view(width, n_items, rank, length).unbind(2),
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
    activation: str = "gelu",
    residual: Tensor | None = None,
) -> Tensor:
    """Same arguments and result as `fastadapters.reference.sequence_fusion`."""
    factors = [
        _factor(*modality, activation)
        for modality in zip(
            inputs, down_weights, down_biases, time_factors, feature_factors, strict=True
        )
    ]
    y = residual
    for terms in zip(*factors, strict=True):
        *others, last = terms
        if y is None:
            y = reduce(torch.mul, terms)
        elif others:
            y = torch.addcmul(y, reduce(torch.mul, others), last)
        else:
            y = y + last
    return cast(Tensor, y)

"""Low-rank fusion of any number of modalities, as its definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .bottleneck import ACTIVATIONS


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
    """residual + sum over the rank of the product over modalities of A^T (act(x Wd^T + b) U).

    The features are expanded first, [B, R, T, D], and the tokens combined second, as published.
    All tensors have one dtype; shapes as `functional`.
    """
    product: Tensor | float = 1.0
    for x, weight, bias, time_factor, feature_factor in zip(
        inputs, down_weights, down_biases, time_factors, feature_factors, strict=True
    ):
        h = ACTIVATIONS[activation](F.linear(x, weight, bias))
        expanded = torch.einsum("btr,qrd->bqtd", h, feature_factor)
        product = product * torch.einsum("qto,bqtd->bqod", time_factor, expanded)
    y = torch.as_tensor(product).sum(dim=1)
    return y if residual is None else residual + y

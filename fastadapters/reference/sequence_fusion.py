"""Low-rank fusion of any number of modalities, as its definition."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import Activation, Fusion
from .bottleneck import ACTIVATIONS


def counted(tokens: int, length: Tensor) -> Tensor:
    """Which tokens of each item count, the first ``length`` [B]: [B, T, 1]."""
    return (torch.arange(tokens, device=length.device) < length[:, None])[..., None]


def leading_tokens(inputs: Sequence[Tensor], out_len: int, lengths: Tensor | None = None) -> Tensor:
    """The first T_o = ``out_len`` tokens of the modalities [B, T_m, D] laid end to end.

    With ``lengths`` [M, B], of those that count, and zeros where there are no more. Else usually a
    view of the first modality.
    """
    if lengths is None:
        leading, missing = [], out_len
        for x in inputs:
            leading.append(x[:, :missing])
            missing -= leading[-1].shape[1]
            if missing == 0:
                break
        return leading[0] if len(leading) == 1 else torch.cat(leading, dim=1)
    sizes = torch.tensor([x.shape[1] for x in inputs], device=lengths.device)[:, None]
    lengths = torch.minimum(lengths.clamp(min=0), sizes)
    ends = lengths.cumsum(dim=0)
    place = torch.arange(out_len, device=lengths.device)
    modality = (ends[..., None] <= place).sum(dim=0)  # [B, T_o]; M where there are no more
    there = modality < len(inputs)
    modality = modality.clamp(max=len(inputs) - 1)
    shift = sizes.cumsum(dim=0) - sizes - (ends - lengths)  # from here to the tensors end to end
    source = torch.where(there, place + shift.T.gather(1, modality), 0)
    tokens = torch.cat(list(inputs), dim=1)
    taken = tokens.gather(1, source[..., None].expand(-1, -1, tokens.shape[2]))
    return torch.where(there[..., None], taken, 0.0)


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
    """residual + sum over the rank of the product over modalities of A^T (act(x Wd^T + b) U).

    The features are expanded first, [B, R, T, D], and the tokens combined second, as published.
    All tensors but the residual have one dtype; lengths [M, B]; shapes as `functional`.
    """
    factors = []
    for i, (x, weight, bias, time_factor, feature_factor) in enumerate(
        zip(inputs, down_weights, down_biases, time_factors, feature_factors, strict=True)
    ):
        time_factor = time_factor[:, : x.shape[1]]
        if fusion == "summed":
            time_factor = time_factor.sum(dim=0, keepdim=True)
            feature_factor = feature_factor.sum(dim=0, keepdim=True)
        if lengths is None:
            h = ACTIVATIONS[activation](F.linear(x, weight, bias))
        else:  # what does not count is not looked at, forward and backward
            mask = counted(x.shape[1], lengths[i])
            h = ACTIVATIONS[activation](F.linear(torch.where(mask, x, 0.0), weight, bias))
            h = torch.where(mask, h, 0.0)
        expanded = torch.einsum("btr,qrd->bqtd", h, feature_factor)
        factors.append(torch.einsum("qto,bqtd->bqod", time_factor, expanded))
    y = functools.reduce(torch.mul, factors).sum(dim=1)
    return y if residual is None else residual + y

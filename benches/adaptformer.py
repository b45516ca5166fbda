"""The published modules that the end-to-end bench runs: AdaptFormer's adapter and its ViT block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """The adapter of AdaptFormer and MultiWay-Adapter, operation for operation."""

    def __init__(
        self,
        dim: int,
        bottleneck: int,
        scale: float | str,
        dropout: float = 0.0,
        layernorm: str | None = None,
    ) -> None:
        super().__init__()
        self.layernorm = layernorm
        if layernorm is not None:
            self.adapter_layer_norm_before = nn.LayerNorm(dim)
        self.scale = nn.Parameter(torch.ones(1)) if scale == "learnable" else scale
        self.down_proj = nn.Linear(dim, bottleneck)
        self.non_linear_func = nn.ReLU()
        self.up_proj = nn.Linear(bottleneck, dim)
        self.dropout = dropout

    def forward(
        self, x: Tensor, add_residual: bool = True, residual: Tensor | None = None
    ) -> Tensor:
        residual = x if residual is None else residual
        if self.layernorm == "in":
            x = self.adapter_layer_norm_before(x)
        down = self.non_linear_func(self.down_proj(x))
        down = F.dropout(down, p=self.dropout, training=self.training)
        up = self.up_proj(down)
        up = up * self.scale
        if self.layernorm == "out":
            up = self.adapter_layer_norm_before(up)
        return up + residual if add_residual else up


class Block(nn.Module):
    """A transformer layer of Hugging Face's ViT with an adapter parallel to its MLP."""

    def __init__(self, layer: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.adapter = adapter

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        layer = self.layer
        attended, _ = layer.attention(layer.layernorm_before(x), *args, **kwargs)
        x = x + attended
        return x + self.adapter(x, residual=layer.mlp(layer.layernorm_after(x)))

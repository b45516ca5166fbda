"""The published modules that the end-to-end bench runs: AdaptFormer's adapter and its ViT block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """The adapter of AdaptFormer and MultiWay-Adapter, operation for operation."""

    def __init__(self, dim: int, bottleneck: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.down_proj = nn.Linear(dim, bottleneck)
        self.up_proj = nn.Linear(bottleneck, dim)
        self.scale = scale
        self.dropout = dropout

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        down = F.relu(self.down_proj(x))
        down = F.dropout(down, p=self.dropout, training=self.training)
        up = self.up_proj(down)
        return up * self.scale + residual


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

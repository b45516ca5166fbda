"""Adapters of which a repository has the code and no package index: written from what they do.

What is right in them is their forward: its tree's hash is that of the published one, which the
tests of `patch` state. Around them, small models that call them as the published ones do.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor


class AdaptFormer(nn.Module):
    """ShoufaChen/AdaptFormer 6967d67, models/adapter.py."""

    def __init__(
        self,
        dim: int,
        bottleneck: int,
        scale: float | str = 0.1,
        layernorm: str = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.adapter_layernorm_option = layernorm
        self.adapter_layer_norm_before = nn.LayerNorm(dim) if layernorm != "none" else None
        self.scale = nn.Parameter(torch.ones(1)) if scale == "learnable_scalar" else float(scale)
        self.down_proj = nn.Linear(dim, bottleneck)
        self.non_linear_func: nn.Module = nn.ReLU()
        self.up_proj = nn.Linear(bottleneck, dim)
        self.dropout = dropout

    def forward(self, x, add_residual=True, residual=None):  # type: ignore[no-untyped-def]
        residual = x if residual is None else residual
        if self.adapter_layernorm_option == "in":
            x = self.adapter_layer_norm_before(x)
        down = self.down_proj(x)
        down = self.non_linear_func(down)
        down = nn.functional.dropout(down, p=self.dropout, training=self.training)
        up = self.up_proj(down)
        up = up * self.scale
        if self.adapter_layernorm_option == "out":
            up = self.adapter_layer_norm_before(up)
        if add_residual:  # noqa: SIM108 (the tree is to be the published one)
            output = up + residual
        else:
            output = up
        return output


class MultiWay(AdaptFormer):
    """longkukuhi/MultiWay-Adapter 8999b5a, adapter.py: the same, but for a default."""

    forward = FunctionType(AdaptFormer.forward.__code__, globals(), argdefs=(False, None))


class FeedForward(nn.Module):
    """torchscale 0.3.0, torchscale/component/feedforward_network.py."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: Any = nn.functional.gelu,
        dropout: float = 0.0,
        activation_dropout: float = 0.0,
        subln: bool = False,
    ) -> None:
        super().__init__()
        self.activation_fn = activation
        self.activation_dropout_module = nn.Dropout(activation_dropout)
        self.dropout_module = nn.Dropout(dropout)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.ffn_layernorm = nn.LayerNorm(hidden) if subln else None

    def forward(self, x):  # type: ignore[no-untyped-def]
        x_shape = x.shape
        x = x.reshape(-1, x.size(-1))
        x = self.fc1(x)
        x = self.activation_fn(x.float()).type_as(x)
        x = self.activation_dropout_module(x)
        if self.ffn_layernorm is not None:
            x = self.ffn_layernorm(x)
        x = self.fc2(x)
        x = x.view(x_shape)
        x = self.dropout_module(x)
        return x


class MaskedAttention(nn.Module):
    """dqmis/clip-mma 1287cb5, fomo/models/clip/modules/masked_multi_head_attention.py."""

    def __init__(self, dim: int, num_heads: int = 4) -> None:
        super().__init__()
        self._num_heads = num_heads
        self.mha = nn.MultiheadAttention(dim, num_heads)
        self._attn_mask = self._init_attn_mask(1, 1)
        self.linear = nn.Sequential(nn.Linear(dim, 8), nn.GELU(), nn.Linear(8, dim))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @staticmethod
    def _init_attn_mask(num_prompts, num_images):  # type: ignore[no-untyped-def]
        num_total = num_prompts + num_images
        mask = torch.zeros((num_total, num_total))
        for i in range(num_prompts):
            for j in range(num_prompts, num_total):
                mask[i, j] = 1
        for i in range(num_prompts, num_total):
            for j in range(num_prompts):
                mask[i, j] = 1
        return mask

    def forward(self, inputs):  # type: ignore[no-untyped-def]
        batch_size = inputs.shape[1]
        seq_len = inputs.shape[0]
        if self._attn_mask.shape[0] != seq_len:
            self._attn_mask = self._init_attn_mask(seq_len - 1, 1)
        mask = self._attn_mask.clone().unsqueeze(0).repeat(batch_size * self._num_heads, 1, 1).to(self.device)  # fmt: skip # noqa: E501
        output, _ = self.mha.forward(inputs, inputs, inputs, attn_mask=mask)
        output = self.linear(output)
        return output


class MaskedAttentionDownsampled(MaskedAttention):
    """The other of the two: masked_multi_head_attention_downsampled.py."""

    def __init__(self, dim: int, width: int, num_heads: int = 4) -> None:
        super().__init__(width, num_heads)
        del self.linear
        self.downsampler = nn.Sequential(nn.Linear(dim, 8), nn.Linear(8, width))
        self.upsampler = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, dim))

    def forward(self, inputs):  # type: ignore[no-untyped-def]
        batch_size = inputs.shape[1]
        seq_len = inputs.shape[0]
        if self._attn_mask.shape[0] != seq_len:
            self._attn_mask = self._init_attn_mask(seq_len - 1, 1)
        mask = self._attn_mask.clone().unsqueeze(0).repeat(batch_size * self._num_heads, 1, 1).to(self.device)  # fmt: skip # noqa: E501
        output = self.downsampler(inputs)
        output, _ = self.mha.forward(output, output, output, attn_mask=mask)
        output = self.upsampler(output)
        return output


class Layer(nn.Module):
    """An AdaptFormer layer without attention: the adapter is parallel to the MLP, or behind it."""

    def __init__(self, dim: int, bottleneck: int, parallel: bool = True, **options: Any) -> None:
        super().__init__()
        self.parallel = parallel
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.adaptmlp = AdaptFormer(dim, bottleneck, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel:
            y: Tensor = x + self.mlp(self.norm(x)) + self.adaptmlp(x, add_residual=False)
            return y
        y = x + self.adaptmlp(self.mlp(self.norm(x)))
        return y


class MultiWayLayer(nn.Module):
    """The two adapters, called under crossed names, and the enhancer."""

    def __init__(self, dim: int, bottleneck: int, split: int = -1, **options: Any) -> None:
        super().__init__()
        self.split = split
        self.adaptmlp_text = MultiWay(dim, bottleneck, **options)
        self.adaptmlp_vision = MultiWay(dim, bottleneck, **options)
        self.ffn = FeedForward(dim, 2 * dim, subln=True)
        self.enhancemlp = FeedForward(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        adapted = self.adaptmlp_text(x) if self.split == -1 else self.adaptmlp_vision(x)
        x = x + self.ffn(x) + adapted
        y: Tensor = x + self.enhancemlp(x)
        return y


class Head(nn.Module):
    """The head of clip-mma around its adapter: which image feature is blended, and how."""

    def __init__(self, adapter: nn.Module, text: Tensor) -> None:
        super().__init__()
        self.adapter = adapter
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("text", text)

    def forward(self, image: Tensor) -> Tensor:
        text: Any = self.text
        tokens = torch.cat([text[:, None].expand(-1, len(image), -1), image[None]])
        image = 0.2 * self.adapter(tokens)[-1] + 0.8 * image
        image = image / image.norm(dim=-1, keepdim=True)
        text = text / text.norm(dim=-1, keepdim=True)
        logits: Tensor = self.logit_scale.exp() * image @ text.t()
        return logits

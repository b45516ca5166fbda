"""The two adapters of clip-mma (dqmis/clip-mma 1287cb5, fomo/models/clip/modules/).

The attention runs on the op, without the mask of [B * H, C + 1, C + 1] that each call builds, moves
and repeats; the layers around it are called. Skipped: another mask than the published, +1 across
modalities; attention with dropout, biases on keys or zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import backends, functional
from ..functional.arguments import autocast_dtype
from ..modules.layers import why_all_called, why_called
from .patching import Client, Forward
from .trees import tree_hash

_BIAS = ((0.0, 1.0), (1.0, 0.0))
_MASK = "7567aac8a19aa9f1"
_PARTS = frozenset(["mha", "_attn_mask"])


def _why_not(module: Any) -> str | None:
    """Why the op doesn't do what the module's attention does."""
    mha = module.mha
    reason = why_called("mha", mha, nn.MultiheadAttention) or why_called(
        "mha.out_proj", mha.out_proj, NonDynamicallyQuantizableLinear
    )
    if reason is not None:
        return reason
    if mha.dropout > 0.0:
        return "mha has dropout"
    if mha.bias_k is not None or mha.add_zero_attn or mha.batch_first or mha.in_proj_weight is None:
        return "mha has other options than the published: its own forward is called"
    return None


def why_not(module: Any, holder: nn.Module | None) -> str | None:
    if tree_hash(type(module)._init_attn_mask) != _MASK:
        return "mask not known"
    return _why_not(module)


def _why_called_on(module: Any, x: Tensor) -> str | None:
    reason = why_all_called(inputs=x)
    if reason is not None:
        return reason
    if x.dim() != 3 or len(x) < 2:
        return "inputs are not [C + 1, B, D]"
    mixes = autocast_dtype(x) is not None
    return (
        None
        if mixes or x.dtype == module.mha.in_proj_weight.dtype
        else "inputs are of another dtype"
    )


def _attend(mha: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """What ``mha`` makes of tokens [C + 1, B, E], the last of which is the image."""
    tokens, items, _ = x.shape
    projected = F.linear(x, mha.in_proj_weight, mha.in_proj_bias)
    # [C + 1, B, 3 E] to q, k and v [B, C + 1, H, d]
    q, k, v = projected.view(tokens, items, 3, mha.num_heads, -1).permute(2, 1, 0, 3, 4)
    text, image = functional.cross_modal_attention(
        q[:, :-1], k[:, :-1], v[:, :-1], q[:, -1:], k[:, -1:], v[:, -1:], bias=_BIAS
    )
    out = torch.cat([text, image], dim=1).flatten(2).transpose(0, 1)
    return F.linear(out, mha.out_proj.weight, mha.out_proj.bias)


def _override(own: Forward, before: str | None, after: str) -> Forward:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        reason = _why_not(self) or _why_called_on(self, inputs)
        if reason is not None:
            backends.call_layers("cross_modal_attention", reason)
            y: Tensor = own(self, inputs)
            return y
        x = inputs if before is None else self._modules[before](inputs)
        y = self._modules[after](_attend(self.mha, x))
        return y

    return forward


def override(own: Forward) -> Forward:
    return _override(own, None, "linear")


def override_downsampled(own: Forward) -> Forward:
    return _override(own, "downsampler", "upsampler")


CLIENTS = [
    Client("clip-mma", frozenset(["8b7eba02b73edf34"]), _PARTS, why_not, override),
    Client("clip-mma", frozenset(["8c0f9edbadbb4c45"]), _PARTS, why_not, override_downsampled),
]

"""MultiWay-Adapter's Alignment Enhancer: the FeedForwardNetwork of torchscale (0.2.0, 0.3.0,
torchscale/component/feedforward_network.py), wherever it is.

Skipped: ``subln``, BEiT-3's LayerNorm between activation and ``fc2``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..modules.layers import why_called
from .bottlenecks import Bottleneck, activation_of, run, why_called_on, why_not_plain
from .patching import Client, Forward


def bottleneck_of(module: Any) -> Bottleneck | str:
    """What the module's forward computes up to its last dropout, or why no op does."""
    if module.ffn_layernorm is not None:
        return "subln: no op has a LayerNorm between the projections"
    activation, reason = activation_of("activation_fn", module.activation_fn)
    if activation is None:
        return reason
    drop = module.activation_dropout_module
    called = why_called("activation_dropout_module", drop, nn.Dropout)
    if called is not None:
        return called
    b = Bottleneck(module.fc1, module.fc2, activation, dropout=drop.p if drop.training else 0.0)
    return why_not_plain(b, ("fc1", "fc2", "")) or b


def why_not(module: nn.Module, holder: nn.Module | None) -> str | None:
    b = bottleneck_of(module)
    return b if isinstance(b, str) else None


def override(own: Forward) -> Forward:
    def forward(self: Any, x: Tensor) -> Tensor:
        b = bottleneck_of(self)
        reason = b if isinstance(b, str) else why_called_on(b, x)
        if reason is None and x.dtype == torch.float64:
            reason = "the activation is in float32, x in float64"
        if isinstance(b, str) or reason is not None:
            backends.call_layers("bottleneck", str(reason))
            y: Tensor = own(self, x)
            return y
        y = self.dropout_module(run(b, x, None, self.training))
        return y

    return forward


CLIENTS = [
    Client(
        "torchscale",
        frozenset(["70bd1d1ca04d5d9b"]),
        frozenset(["fc1", "fc2", "activation_dropout_module"]),
        why_not,
        override,
    )
]

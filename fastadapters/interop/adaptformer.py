"""The `Adapter` of AdaptFormer (ShoufaChen/AdaptFormer 6967d67, models/adapter.py), of
MultiWay-Adapter (longkukuhi/MultiWay-Adapter 8999b5a, adapter.py) and of their exact copies.

The two differ in the default of ``add_residual`` alone, which each class keeps. Skipped: an
activation that no op has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from .bottlenecks import Bottleneck, activation_of, run, why_called_on, why_not_plain
from .patching import Client, Forward

_NAMES = ("down_proj", "up_proj", "adapter_layer_norm_before")


def bottleneck_of(module: Any) -> Bottleneck | str:
    """What the module's forward computes, or why no op does."""
    option = module.adapter_layernorm_option
    activation, reason = activation_of("non_linear_func", module.non_linear_func)
    if activation is None:
        return reason
    b = Bottleneck(
        module.down_proj,
        module.up_proj,
        activation,
        module.scale,
        module.dropout,
        module.adapter_layer_norm_before if option in ("in", "out") else None,
        option == "out",
    )
    return why_not_plain(b, _NAMES) or b


def why_not(module: nn.Module, holder: nn.Module | None) -> str | None:
    b = bottleneck_of(module)
    return b if isinstance(b, str) else None


def adapter_of(module: nn.Module) -> tuple[Bottleneck, bool] | str:
    """The layers, and whether x is added by default."""
    b = bottleneck_of(module)
    defaults: Any = type(module).forward.__defaults__
    return b if isinstance(b, str) else (b, bool(defaults[0]))


def override(own: Forward) -> Forward:
    def forward(
        self: nn.Module, x: Tensor, add_residual: bool = True, residual: Tensor | None = None
    ) -> Tensor:
        added = (x if residual is None else residual) if add_residual else None
        b = bottleneck_of(self)
        reason = b if isinstance(b, str) else why_called_on(b, x, added)
        if isinstance(b, str) or reason is not None:
            backends.call_layers("bottleneck", str(reason))
            y: Tensor = own(self, x, add_residual, residual)
            return y
        return run(b, x, added, self.training)

    return forward


CLIENTS = [
    Client(
        "adaptformer",
        frozenset(["a0a51c0b0c2492e1"]),
        frozenset(["down_proj", "up_proj", "non_linear_func"]),
        why_not,
        override,
        (("nn", torch.nn),),
    )
]

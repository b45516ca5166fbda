"""What our modules share with a client's adapter: see `BottleneckAdapter.from_module`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from . import adapter_hub, adaptformer
from .bottlenecks import Bottleneck
from .patching import Client, client_of

_ADAPTERS: dict[Client | None, Callable[[Any], tuple[Bottleneck, bool] | str]] = {
    client: module.adapter_of for module in (adaptformer, adapter_hub) for client in module.CLIENTS
}


def adapter_of(module: nn.Module) -> tuple[Bottleneck, bool]:
    """(the layers of a client's adapter, whether it adds x by default); ValueError if unknown."""
    kind = type(module)
    if not isinstance(module, nn.Module) or "forward" in module.__dict__:
        raise ValueError(
            f"module: its forward is not known, a {kind.__module__}.{kind.__qualname__}"
        )
    client = client_of(module)
    if client not in _ADAPTERS:
        raise ValueError(
            "module: expected an adapter of AdaptFormer, MultiWay-Adapter or `adapters`, whose "
            f"forward is known, got a {kind.__module__}.{kind.__qualname__}"
        )
    found = _ADAPTERS[client](module)
    if isinstance(found, str):
        raise ValueError(f"module: {found}")
    return found

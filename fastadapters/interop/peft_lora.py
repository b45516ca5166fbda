"""LoRA of `peft` (0.17.1, 0.18.1 to 0.21.2, peft/tuners/lora/layer.py, `Linear`).

The frozen layer is called as it is there. The dropout in front of A is the op's where it is plain
`nn.Dropout`: of the same probability, with another mask; anything else is called. Skipped: the
variants (DoRA and others). Merged, disabled or mixed adapters run in peft's own forward.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import backends
from ..modules.layers import why_called
from .bottlenecks import Bottleneck, run, why_called_on, why_not_plain
from .patching import Client, Forward


def bottleneck_of(module: Any, name: str) -> Bottleneck | str:
    """What one adapter adds, or why no op does."""
    if name in module.lora_variant:
        return f"{name} is a variant of LoRA: {type(module.lora_variant[name]).__name__}"
    b = Bottleneck(module.lora_A[name], module.lora_B[name], "identity", module.scaling[name])
    return why_not_plain(b, (f"lora_A.{name}", f"lora_B.{name}", ""), square=False) or b


def _plain_probability(dropout: nn.Module) -> float | None:
    """With what probability ``dropout`` drops an element of x now; None if it has to be called."""
    if type(dropout) is nn.Identity and why_called("", dropout, nn.Identity) is None:
        return 0.0
    if type(dropout) is nn.Dropout and why_called("", dropout, nn.Dropout) is None:
        return dropout.p if dropout.training else 0.0
    return None


def why_not(module: Any, holder: nn.Module | None) -> str | None:
    if not len(module.lora_A):
        return "it has no LoRA adapter"
    found = (bottleneck_of(module, name) for name in module.lora_A)
    return next((b for b in found if isinstance(b, str)), None)


def _active(self: Any, x: Tensor) -> list[tuple[str, Bottleneck]] | str:
    """The adapters to add to what the frozen layer makes of x, or why peft has to do it."""
    if self.disable_adapters or self.merged:
        return "its adapters are disabled or merged"
    active = []
    for name in self.active_adapters:
        if name in self.lora_A:
            b = bottleneck_of(self, name)
            if isinstance(b, str):
                return b
            weight: Any = b.down._parameters["weight"]
            reason = why_called_on(b, self._cast_input_dtype(x, weight.dtype))
            if reason is not None:
                return reason
            active.append((name, b))
    return active


def override(own: Forward) -> Forward:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = "it is called with more than x" if args or kwargs else _active(self, x)
        if isinstance(active, str):
            backends.call_layers("bottleneck", active)
            y: Tensor = own(self, x, *args, **kwargs)
            return y
        result: Tensor = self.base_layer(x)
        dtype = result.dtype
        for name, b in active:
            weight: Any = b.down._parameters["weight"]
            x = self._cast_input_dtype(x, weight.dtype)
            p = _plain_probability(self.lora_dropout[name])
            if p is None:
                x_in, p = self.lora_dropout[name](x), 0.0
            else:
                x_in = x
            result = run(b._replace(input_dropout=p), x_in, result, p > 0.0)
        return result.to(dtype)

    return forward


CLIENTS = [
    Client(
        "peft",
        frozenset(["33969d320c7d70ee", "8c427fa41c235a6f"]),
        frozenset(["base_layer", "lora_A", "lora_B"]),
        why_not,
        override,
    )
]

"""`Adapter` and `ParallelAdapter` of `adapters` (1.0.1 to 1.3.0, adapters/methods/modeling.py).

SeqBn, DoubleSeqBn, ParBn, MAM, AdapterPlus, alone and in compositions. What is behind the scale,
dropout, residual and LayerNorm, is called as it is there, as is stochastic depth. ``down``, second
of the three results, is None: `BottleneckLayer` doesn't read it. Skipped: gating, PHM, an
activation that no op has, an adapter anywhere but in a `BottleneckLayer`.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from .. import backends
from ..modules.layers import why_called
from .bottlenecks import Bottleneck, activation_of, run, why_called_on, why_not_plain
from .patching import Client, Forward, client_of
from .trees import tree_hash

_PARTS = frozenset(["adapter_down", "adapter_up"])
_COMPOSE_SINGLE = "828e2f1de725f955"


def bottleneck_of(module: Any) -> Bottleneck | str:
    """What the module's forward computes up to the scale, or why no op does."""
    if module.use_gating:
        return "gating: the gate is the mean over all tokens"
    layers = module.adapter_down
    reason = why_called("adapter_down", layers, nn.Sequential)
    if reason is not None:
        return reason
    *norm, down, f = layers
    activation, reason = activation_of(f"adapter_down.{len(layers) - 1}", f)
    if activation is None:
        return reason
    b = Bottleneck(
        down, module.adapter_up, activation, module.scaling, norm=norm[0] if norm else None
    )
    return why_not_plain(b, (f"adapter_down.{len(norm)}", "adapter_up", "adapter_down.0")) or b


def why_not(module: nn.Module, holder: nn.Module | None) -> str | None:
    compose = getattr(type(holder), "compose_single", None)
    if compose is None or tree_hash(compose) != _COMPOSE_SINGLE:
        return "what is around it may read its second result, which the op doesn't give"
    b = bottleneck_of(module)
    return b if isinstance(b, str) else None


def adapter_of(module: Any) -> tuple[Bottleneck, bool] | str:
    """The layers of the whole adapter, and whether a residual is added."""
    b = bottleneck_of(module)
    if isinstance(b, str):
        return b
    parallel = client_of(module) is CLIENTS[1]
    if module.dropout.p > 0.0 or "DropPath" in module._modules:
        return "dropout or stochastic depth is behind the up-projection"
    if module.add_layer_norm_after:
        if b.norm is not None:
            return "there are two LayerNorms"
        if module.adapter_residual_before_ln and not parallel:
            return "the LayerNorm is behind the residual"
        b = b._replace(norm=module.adapter_norm_after, after=True)
    return b, not parallel


def _up(self: Any, x: Tensor) -> Tensor | None:
    """scale * up(...), without residual; None where the layers must be called."""
    b = bottleneck_of(self)
    reason = b if isinstance(b, str) else why_called_on(b, x)
    if reason is None and self._forward_hooks:
        reason = "it has hooks, which may read its second result"
    if isinstance(b, str) or reason is not None:
        backends.call_layers("bottleneck", str(reason))
        return None
    if "DropPath" not in self._modules:
        return run(b, x, None, self.training)
    up = self.DropPath(run(b._replace(scale=1.0), x, None, self.training)) * self.scaling
    return cast(Tensor, up)


def override(own: Forward) -> Forward:
    def forward(self: Any, x: Tensor, residual_input: Tensor, output_gating: bool = False) -> Any:
        up = _up(self, x)
        if up is None:
            return own(self, x, residual_input, output_gating)
        output = self.dropout(up)
        if self.adapter_residual_before_ln:
            output = output + residual_input
        if self.add_layer_norm_after:
            output = self.adapter_norm_after(output)
        if not self.adapter_residual_before_ln:
            output = output + residual_input
        return output, None, up

    return forward


def override_parallel(own: Forward) -> Forward:
    def forward(self: Any, x: Tensor, residual_input: Tensor, output_gating: bool = False) -> Any:
        up = _up(self, x)
        if up is None:
            return own(self, x, residual_input, output_gating)
        output = self.dropout(up)
        if self.add_layer_norm_after:
            output = self.adapter_norm_after(output)
        return output, None, up

    return forward


CLIENTS = [
    Client(
        "adapters", frozenset(["4b21377f118b702b", "05b466419dec77f9"]), _PARTS, why_not, override
    ),
    Client("adapters", frozenset(["d9b198c340dfa65e"]), _PARTS, why_not, override_parallel),
]

"""A module's layers are modules, too: when an op may read their parameters past their forward.

LoRA, weight_norm, pruning, hooks, FSDP units, offloading, 8-bit weights or tensor parallelism on an
inner layer act when that layer is called. So where there may be such a thing, it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy, Tracer
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _global_backward_hooks as _backward_hooks
from torch.nn.modules.module import _global_backward_pre_hooks as _backward_pre_hooks
from torch.nn.modules.module import _global_forward_hooks as _hooks
from torch.nn.modules.module import _global_forward_pre_hooks as _pre_hooks

from ..backends import PLAIN_TYPES
from ..checks import check_floats
from ..functional.shards import is_replicated, is_sharded

# The layers that the ops know, with the forward that they know.
_FORWARDS: dict[type[nn.Module], object] = {
    kind: kind.forward
    for kind in (
        nn.Linear,
        NonDynamicallyQuantizableLinear,
        nn.LayerNorm,
        nn.MultiheadAttention,
        nn.Sequential,
        nn.GELU,
        nn.Dropout,
        nn.Identity,
    )
}

_WEIGHTED = frozenset((nn.Linear, NonDynamicallyQuantizableLinear, nn.LayerNorm))


def why_called(name: str, layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> str | None:
    """Why ``layer`` must be called; None where ``kind`` and its parameters say all that it does."""
    state = layer.__dict__
    parameters = state["_parameters"]
    hooks = (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )
    if type(layer) is not kind:
        reason = f"is a {type(layer).__module__}.{type(layer).__qualname__}"
    elif "forward" in state or kind.forward is not _FORWARDS.get(kind, kind.forward):
        reason = "has another forward than its class"
    elif hooks:
        reason = "has hooks"
    elif kind in _WEIGHTED and (parameters.get("weight") is None or "bias" not in parameters):
        reason = "has no weight, or one that is no parameter"
    else:
        for t in parameters.values():
            if type(t) not in PLAIN_TYPES and not is_replicated(t):
                reason = f"has a {type(t).__name__} as parameter"
                break
        else:
            return None
    return f"{name} {reason}: its own forward is called"


def why_attention_called(name: str, mha: Any) -> str | None:
    """Why ``mha``, a layer of self-attention, must be called, as `why_called`."""
    out_proj = mha.out_proj
    reason = why_called(name, mha, nn.MultiheadAttention) or why_called(
        f"{name}.out_proj", out_proj, NonDynamicallyQuantizableLinear
    )
    if reason is not None:
        return reason
    if mha.dropout > 0.0 and mha.training:
        return f"{name} has dropout: its own forward is called"
    own = mha._parameters
    needed = own.get("in_proj_weight"), own.get("in_proj_bias"), out_proj._parameters["bias"]
    if any([t is None for t in needed]) or mha.bias_k is not None or mha.add_zero_attn:
        return f"{name} has other options than the published: its own forward is called"
    return None


def why_all_called(**tensors: object) -> str | None:
    """Why no layer may be passed over, whatever it is.

    tensors: what the layers would work on, each a tensor or a dict of tensors by index.
    """
    if _hooks or _pre_hooks or _backward_hooks or _backward_pre_hooks:
        return "there are hooks on all modules: each layer's own forward is called"
    for name, value in tensors.items():
        for i, t in value.items() if type(value) is dict else ((None, value),):
            if type(t) not in PLAIN_TYPES and isinstance(t, (Tensor, Proxy)) and not is_sharded(t):
                at = name if i is None else f"{name}[{i}]"
                return f"{at} is a {type(t).__name__}: plain PyTorch runs on it"
    return None


def listed(parameters: nn.ParameterList) -> list[Tensor]:
    """``[*parameters]``, which looks up each of them for as long as a small kernel runs."""
    own = parameters._parameters
    if [*own] == [*map(str, range(len(parameters)))]:
        return cast("list[Tensor]", [*own.values()])
    return [*parameters]


def check_input(name: str, x: Tensor, layer: nn.Module) -> None:
    """x must be what ``layer`` takes, as far as that says so: a lazy one does not, at first.

    Of a Proxy nothing is known.
    """
    if isinstance(x, Proxy):
        return
    check_floats(name, x, "[..., D]")
    width = getattr(layer, "in_features", None) or None
    if x.dim() == 0 or (isinstance(width, int) and x.shape[-1] != width):
        raise ValueError(f"{name}: expected [..., D] with D = {width}, got {list(x.shape)}")


def as_leaf(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A call of ``module`` as one node of the graph, where torch.fx traces a model around it.

    None where it does not, or traces the module itself.
    """
    for arg in args:
        for t in arg if isinstance(arg, (list, tuple)) else (arg,):
            tracer = t.tracer if isinstance(t, Proxy) else None
            if isinstance(tracer, Tracer) and tracer.root is not module:
                return tracer.create_proxy(
                    "call_module", tracer.path_of_module(module), args, kwargs
                )
    return None


def like_an_op(x: Tensor, branch: Callable[[], Tensor]) -> Tensor:
    """What ``branch``, calls of layers, makes of x, in the dtypes of an op.

    Under autocast these are PyTorch's own; else a 16-bit x has parameters rounded to its dtype.
    """
    rounds = (
        isinstance(x, Tensor)
        and x.dtype in (torch.bfloat16, torch.float16)
        and not x.is_meta
        and not torch.is_autocast_enabled(x.device.type)
    )
    if not rounds:
        return branch()
    with torch.autocast(x.device.type, x.dtype):
        return branch().to(x.dtype)


def keep_initial_values(module: nn.Module) -> None:
    """Let no Hugging Face model around ``module`` draw its layers' initial values again.

    `PreTrainedModel.post_init` initializes every Linear but those that carry this mark. On the meta
    device there are no values yet.
    """
    for layer in module.modules():
        if layer is not module and not any(p.is_meta for p in layer.parameters()):
            layer.__dict__["_is_hf_initialized"] = True

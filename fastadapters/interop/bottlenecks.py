"""A client's bottleneck as the op takes it, and when its layers have to be called instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..backends import FUSED_DTYPES
from ..functional.arguments import autocast_dtype
from ..modules.bottleneck import normalize
from ..modules.layers import why_all_called, why_called
from ..options import Activation
from .trees import tree_hash

_FUNCTIONS: dict[Callable[..., Any], Activation] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
}
_MODULES: dict[type[nn.Module], Activation] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Identity: "identity",
}
_GELUS: dict[str, Activation] = {"none": "gelu", "tanh": "gelu_tanh"}

# Modules that only call what they hold: the attribute, by the hash of their forward.
# `adapters` 1.3.0 Activation_Function_Class; transformers 4.57.6 to 5.23.0 GELUActivation.
_HOLDERS = {"244f00cbd5b914e9": "f", "1f4fd6783f15cc8c": "act"}
_held: dict[type[nn.Module], str | None] = {}


class Bottleneck(NamedTuple):
    """norm -> dropout of the input -> down -> activation -> dropout -> up -> scale.

    The norm is last if ``after``.
    """

    down: nn.Module
    up: nn.Module
    activation: Activation
    scale: float | Tensor = 1.0
    dropout: float = 0.0
    norm: nn.Module | None = None
    after: bool = False
    input_dropout: float = 0.0


def activation_of(name: str, f: Any) -> tuple[Activation | None, str]:
    """(the op's name for ``f``, "") or (None, why it has none); ``name`` is the client's."""
    if not isinstance(f, nn.Module):
        known = _FUNCTIONS.get(f)
        return known, f"{name} is {f}: no op has this activation"
    kind = type(f)
    reason = why_called(name, f, kind)
    if reason is not None:
        return None, reason
    known = _GELUS.get(str(f.approximate)) if kind is nn.GELU else _MODULES.get(kind)
    if known is not None:
        return known, ""
    if kind not in _held:
        _held[kind] = _HOLDERS.get(tree_hash(kind.forward) or "")
    attribute = _held[kind]
    if attribute is not None:
        return activation_of(name, getattr(f, attribute))
    return None, f"{name} is a {kind.__module__}.{kind.__qualname__}: no op has this activation"


def why_not_plain(
    b: Bottleneck,
    names: tuple[str, str, str] = ("down_proj", "up_proj", "norm"),
    square: bool = True,
) -> str | None:
    """Why the op can't stand for these layers, whatever x may be.

    ``square``: whether the client knows adapters with as many channels out as in only.
    """
    reason = why_called(names[0], b.down) or why_called(names[1], b.up)
    if reason is None and b.norm is not None:
        reason = why_called(names[2], b.norm, nn.LayerNorm)
    if reason is not None:
        return reason
    shape: Any = b.down._parameters["weight"].shape  # type: ignore[union-attr]
    n, r = b.up._parameters["weight"].shape  # type: ignore[union-attr]
    if r != shape[0]:
        return f"{names[1]} takes {r} channels, {names[0]} gives {shape[0]}"
    if square and n != shape[1]:
        return f"it maps {shape[1]} to {n} channels: expected as many out as in"
    if not 0.0 <= b.dropout < 1.0:
        return f"dropout is {b.dropout}"
    if isinstance(b.scale, Tensor):
        if b.scale.shape not in ((), (1,), (shape[1],)):
            return f"the scale has shape {list(b.scale.shape)}"
    elif not isinstance(b.scale, (int, float)):
        return f"the scale is a {type(b.scale).__name__}"
    return None


def why_called_on(b: Bottleneck, x: Tensor, residual: Tensor | None = None) -> str | None:
    """Why the layers must be called on this x: what PyTorch does with it is another thing."""
    reason = why_all_called(x=x, residual=residual, scale=b.scale)
    if reason is not None:
        return reason
    if residual is not None and residual is not x and residual.shape != x.shape:
        return "residual has another shape than x: it is broadcast"
    dtype = x.dtype
    tensors = [*b.down._parameters.values(), *b.up._parameters.values(), b.scale]
    if b.norm is not None:
        tensors += b.norm._parameters.values()
    for t in tensors:
        if (
            isinstance(t, Tensor)
            and t.dtype != dtype
            and (t.dtype not in FUSED_DTYPES or autocast_dtype(x) is None)
        ):
            return "x and the parameters are of several dtypes, without autocast"
    return None


def run(b: Bottleneck, x: Tensor, residual: Tensor | None, training: bool) -> Tensor:
    """The op on x, and the residual added if there is one."""
    down, up = b.down._parameters, b.up._parameters
    norm = {} if b.norm is None or b.after else b.norm._parameters
    scales_last = b.after and isinstance(b.scale, Tensor)
    y = functional.bottleneck(
        x,
        down["weight"],  # type: ignore[arg-type]
        up["weight"],  # type: ignore[arg-type]
        down_bias=down["bias"],
        up_bias=up["bias"],
        activation=b.activation,
        scale=1.0 if scales_last else b.scale,
        residual=None if b.after else residual,
        norm_weight=norm.get("weight"),
        norm_bias=norm.get("bias"),
        norm_eps=1e-5 if b.norm is None else b.norm.eps,  # type: ignore[arg-type]
        dropout=b.dropout,
        input_dropout=b.input_dropout,
        training=training,
    )
    if not b.after:
        return y
    y = normalize(y, b.norm, b.scale)  # type: ignore[arg-type]
    return y if residual is None else y + residual

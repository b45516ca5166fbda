"""Two bottlenecks side by side on the tokens of one tensor, as PyTorch operators.

y[..., :split, :] is the first adapter's and y[..., split:, :] the second's. Both write into one y
(and one dx), which saves the copies that slicing and concatenating would cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd
from .bottleneck import (
    OPTIONS,
    PARAMETERS,
    allocate_gradients,
    allocate_saved,
    declare,
)

_N = len(PARAMETERS)
_SIDES = ("_first", "_second")
_SIDE = _N + 2  # parameters, seed, scale_value
_INPUTS = ", ".join(f"{declare(side)}, float scale_value{side}" for side in _SIDES)
_INPUTS = f"int split, {_INPUTS}, {OPTIONS}"
_SAVED = ", ".join(f"Tensor z{side}, Tensor stats{side}" for side in _SIDES)
_GRADIENTS = ", ".join(f"Tensor d_{name}{side}" for side in _SIDES for name in PARAMETERS)

SCHEMAS = {
    "multiway_forward": f"(Tensor x, Tensor? residual, {_INPUTS}, bool save)"
    f" -> (Tensor y, {_SAVED})",
    "multiway_backward": f"(Tensor dy, Tensor x, {_SAVED}, {_INPUTS}, int needs)"
    f" -> (Tensor dx, {_GRADIENTS})",
}


def _halves(t: Tensor | None, split: int) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if t is None else (t[..., :split, :], t[..., split:, :])


def _sides(rest: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """(parameters, seed, scale_value) of the first and of the second adapter."""
    return rest[:_SIDE], rest[_SIDE : 2 * _SIDE]


def _allocate_forward(x: Tensor, residual: Tensor | None, split: int, *rest: Any) -> Any:
    save = rest[-1]
    saved = (
        allocate_saved(part, side[0], side[4], save)
        for part, side in zip((x[..., :split, :], x[..., split:, :]), _sides(rest), strict=True)
    )
    return x.new_empty(x.shape), *(t for pair in saved for t in pair)


def _allocate_backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    first, second = _sides(rest[5:])
    return allocate_gradients(x, (*first[:_N], *second[:_N]), rest[-1])


def _or_none(t: Tensor, wanted: int) -> Tensor | None:
    return t if wanted else None


def define(library: torch.library.Library, keys: Sequence[str]) -> None:
    """Declare the ops in ``library``, made of its ``bottleneck_*_out`` kernels for ``keys``."""
    namespace = library.ns
    ops = getattr(torch.ops, namespace)

    def forward(x: Tensor, residual: Tensor | None, split: int, *rest: Any) -> Any:
        *options, _save = rest[2 * _SIDE :]
        y, *saved = _allocate_forward(x, residual, split, *rest)
        parts = zip(_halves(y, split), _halves(x, split), _halves(residual, split), strict=True)
        for i, (part, side) in enumerate(zip(parts, _sides(rest), strict=True)):
            y_part, x_part, residual_part = part
            z, stats = (t if t.dim() == 2 else None for t in saved[2 * i : 2 * i + 2])
            ops.bottleneck_forward_out(y_part, z, stats, x_part, residual_part, *side, *options)
        return y, *saved

    def backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        saved, split, inputs = rest[:4], rest[4], rest[5:]
        *options, needs = inputs[2 * _SIDE :]
        gradients = _allocate_backward(dy, x, *rest)
        dx, *others = (_or_none(g, needs >> i & 1) for i, g in enumerate(gradients))
        parts = zip(_halves(dx, split), _halves(dy, split), _halves(x, split), strict=True)
        for i, (part, side) in enumerate(zip(parts, _sides(inputs), strict=True)):
            dx_part, dy_part, x_part = part
            ops.bottleneck_backward_out(
                dx_part,
                *others[i * _N : (i + 1) * _N],
                dy_part,
                x_part,
                *saved[2 * i : 2 * i + 2],
                *side,
                *options,
            )
        return gradients

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _residual, split, *rest, save = inputs
        if not save:
            raise RuntimeError(f"{namespace}::multiway_forward: save=True is needed for gradients")
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        first, second = _sides(rest)
        ctx.split = split
        ctx.options = (first[-1], second[-1], rest[2 * _SIDE :])
        ctx.save_for_backward(x, *output[1:], *first[:-1], *second[:-1])

    def autograd_backward(ctx: Any, dy: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        if dy is None:
            return (None,) * len(needed)
        wanted = (needed[0], *needed[3 : 3 + _N], *needed[3 + _SIDE : 3 + _SIDE + _N])
        gradients: Sequence[Tensor | None] = (None,) * len(wanted)
        if any(wanted):
            x, *saved = ctx.saved_tensors
            tensors = saved[4:]
            scale_first, scale_second, options = ctx.options
            computed = autograd.below_autograd(
                ops.multiway_backward.default, dy, x, *saved[:4], ctx.split, *tensors[: _N + 1],
                scale_first, *tensors[_N + 1 :], scale_second, *options,
                sum(bit << i for i, bit in enumerate(wanted)),
            )  # fmt: skip
            gradients = [_or_none(g, w) for g, w in zip(computed, wanted, strict=True)]
        dx, first, second = gradients[0], gradients[1 : 1 + _N], gradients[1 + _N :]
        unused_options = (None,) * (len(needed) - 3 - 2 * _SIDE)
        d_residual = dy if needed[1] else None
        return dx, d_residual, None, *first, None, None, *second, None, None, *unused_options

    kernels: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "multiway_forward": (forward, _allocate_forward),
        "multiway_backward": (backward, _allocate_backward),
    }
    for name, (kernel, fake) in kernels.items():
        library.define(name + SCHEMAS[name])
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        for key in keys:
            library.impl(name, kernel, key)
    autograd.register(library, "multiway_forward", setup_context, autograd_backward)

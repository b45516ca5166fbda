"""Two bottlenecks side by side on the tokens of one tensor, as PyTorch operators.

y[..., :split, :] is the first adapter's and y[..., split:, :] the second's. Both write into one y
(and one dx), which saves the copies that slicing and concatenating would cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd, schemas
from .bottleneck import (
    CODES,
    PARAMETERS,
    allocate_gradients,
    allocate_saved,
    asked_for,
    declare,
    flops_of_gradients,
    reads_of_adapter,
    widths,
)
from .codes import DTYPES
from .flops import Formula

_N = len(PARAMETERS)
_SIDES = ("_first", "_second")
_SIDE = _N + 1  # parameters, seed
_TENSORS = ", ".join(map(declare, _SIDES))
_SCALES = ", ".join(f"float scale_value{side}" for side in _SIDES)
_OPTIONS = f"SymInt split, {_SCALES}, float norm_eps, float dropout, {CODES}"
_SAVED = ", ".join(f"Tensor z{side}, Tensor stats{side}" for side in _SIDES)
_GRADIENTS = ", ".join(f"Tensor d_{name}{side}" for side in _SIDES for name in PARAMETERS)

SCHEMAS = {
    "multiway_forward": f"(Tensor x, Tensor? residual, {_TENSORS}, {_OPTIONS}, bool save)"
    f" -> (Tensor y, {_SAVED})",
    "multiway_backward": f"(Tensor dy, Tensor x, {_SAVED}, {_TENSORS}, {_OPTIONS}, int needs)"
    f" -> (Tensor dx, {_GRADIENTS})",
}


def _halves(t: Tensor | None, split: int) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if t is None else (t[..., :split, :], t[..., split:, :])


def _sides(rest: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The parameters and the seed of the first and of the second adapter."""
    return rest[:_SIDE], rest[_SIDE : 2 * _SIDE]


def _inputs_of_sides(rest: Sequence[Any]) -> tuple[int, list[list[Any]]]:
    """``split``, and what the bottleneck op takes behind its residual, for each adapter."""
    split, *scale_values = rest[2 * _SIDE : 2 * _SIDE + 3]
    norm_eps, dropout, *codes = rest[2 * _SIDE + 3 : -1]
    options = (norm_eps, dropout, 0.0, *codes)  # no dropout in front
    sides = zip(_sides(rest), scale_values, strict=True)
    return split, [[*side, scale_value, *options] for side, scale_value in sides]


def _allocate_forward(x: Tensor, residual: Tensor | None, *rest: Any) -> Any:
    split, (compute_dtype, out_dtype, _, save) = rest[2 * _SIDE], rest[-4:]
    parts = zip((x[..., :split, :], x[..., split:, :]), _sides(rest), strict=True)
    saved = (allocate_saved(part, side[0], side[4], compute_dtype, save) for part, side in parts)
    y = x.new_empty(x.shape, dtype=DTYPES[out_dtype])
    return y, *(t for pair in saved for t in pair)


def _allocate_backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    first, second = _sides(rest[4:])
    return allocate_gradients(dy, x, (*first[:_N], *second[:_N]), rest[-1])


def _reads(
    needs: tuple[bool, ...], tensors: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[bool]:
    values = False
    saved: list[bool] = []
    parameters: list[bool] = []
    for i, side in enumerate(_sides(tensors[2:])):
        needs_of_side = needs[2 + i * _SIDE :][:_N]
        (of_x, *of_saved), of_parameters = reads_of_adapter(
            (needs[0], *needs_of_side), side[4] is not None, outputs[1 + 2 * i].dim() == 2
        )
        values |= of_x
        saved += of_saved
        parameters += of_parameters
    return values, *saved, *parameters


_FAKES: dict[str, Callable[..., Any]] = {
    "multiway_forward": _allocate_forward,
    "multiway_backward": _allocate_backward,
}


def _multiway_sides(
    a: Mapping[str, Any], shape: Sequence[int]
) -> list[tuple[int, tuple[int, int, int], str]]:
    """(rows, widths, suffix of the names) of both adapters on x or dy of ``shape``."""
    items, tokens = math.prod(shape[:-2]), shape[-2]
    rows = items * a["split"], items * (tokens - a["split"])
    return [(n, widths(a, suffix), suffix) for n, suffix in zip(rows, _SIDES, strict=True)]


def _multiway_forward(a: Mapping[str, Any]) -> int:
    sides = _multiway_sides(a, a["x"].shape)
    return sum(2 * rows * r * (d_in + d_out) for rows, (d_in, d_out, r), _ in sides)


def _multiway_backward(a: Mapping[str, Any]) -> int:
    total, needs = 0, a["needs"]
    for i, (rows, sizes, suffix) in enumerate(_multiway_sides(a, a["dy"].shape)):
        of_side = needs >> len(PARAMETERS) * i & ~1 | needs & 1
        of_side &= (2 << len(PARAMETERS)) - 1
        total += flops_of_gradients(rows, *sizes, of_side, a[f"z{suffix}"].dim() == 2)
    return total


FLOPS: dict[str, Formula] = {
    "multiway_forward": _multiway_forward,
    "multiway_backward": _multiway_backward,
}


def define(library: torch.library.Library, keys: Sequence[str]) -> None:
    """Declare the ops in ``library``, made of its ``bottleneck_*_out`` kernels for ``keys``."""
    ops = getattr(torch.ops, library.ns)

    def forward(x: Tensor, residual: Tensor | None, *rest: Any) -> Any:
        y, *saved = _allocate_forward(x, residual, *rest)
        split, sides = _inputs_of_sides(rest)
        parts = zip(_halves(y, split), _halves(x, split), _halves(residual, split), strict=True)
        for i, ((y_part, x_part, residual_part), side) in enumerate(zip(parts, sides, strict=True)):
            z, stats = (t if t.dim() == 2 else None for t in saved[2 * i : 2 * i + 2])
            ops.bottleneck_forward_out(y_part, z, stats, x_part, residual_part, *side)
        return y, *saved

    def backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        saved, inputs, needs = rest[:4], rest[4:], rest[-1]
        gradients = _allocate_backward(dy, x, *rest)
        first, second = _sides(inputs)
        dx, *others = asked_for(gradients, (*first[:_N], *second[:_N]), needs)
        split, sides = _inputs_of_sides(inputs)
        halves_of_x = (x, x) if x.dim() == 1 else _halves(x, split)  # empty where nothing reads it
        parts = zip(_halves(dx, split), _halves(dy, split), halves_of_x, strict=True)
        for i, ((dx_part, dy_part, x_part), side) in enumerate(zip(parts, sides, strict=True)):
            others_part, saved_part = others[i * _N : (i + 1) * _N], saved[2 * i : 2 * i + 2]
            ops.bottleneck_backward_out(dx_part, *others_part, dy_part, x_part, *saved_part, *side)
        return gradients

    def autograd_backward(ctx: Any, needs: Sequence[bool], dy: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_residual, *need = needs
        wanted = (need_x, *need[:_N], *need[_SIDE : _SIDE + _N])
        dx, *others = autograd.gradients(ops.multiway_backward.default, ctx, (dy,), wanted)
        d_residual = dy if need_residual else None
        return dx, d_residual, *others[:_N], None, *others[_N:], None

    schemas.define(library, SCHEMAS, _FAKES)
    for key in keys:
        library.impl("multiway_forward", forward, key)
        library.impl("multiway_backward", backward, key)
    autograd.register(library, "multiway_forward", autograd_backward, _reads)

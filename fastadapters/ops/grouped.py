"""A bottleneck for each row, of N whose parameters are stacked, as PyTorch operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd, schemas
from .bottleneck import (
    OPTIONS,
    PARAMETERS,
    allocate_gradients,
    allocate_result,
    declare,
    flops_of_forward,
    flops_of_gradients,
    reads_of_adapter,
    widths,
)
from .codes import DTYPES
from .flops import Formula

_INPUTS = f"{declare()}, Tensor index, float scale_value, {OPTIONS}"
_GRADIENTS = ("dx", *(f"d_{name}" for name in PARAMETERS))

SCHEMAS = {
    "grouped_forward": f"(Tensor x, Tensor? residual, {_INPUTS}, bool save)"
    " -> (Tensor y, Tensor z, Tensor stats)",
    "grouped_backward": f"(Tensor dy, Tensor x, Tensor z, Tensor stats, {_INPUTS}, int needs)"
    f" -> ({', '.join(f'Tensor {name}' for name in _GRADIENTS)})",
}


def _reads(
    needs: tuple[bool, ...], tensors: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[bool]:
    norm = tensors[2 + PARAMETERS.index("norm_weight")] is not None
    of_x, of_parameters = reads_of_adapter((needs[0], *needs[2:-2]), norm, True)
    return *of_x, *of_parameters, True


def _fake_forward(
    x: Tensor, residual: Tensor | None, down_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    up_weight, norm_weight = rest[1], rest[3]
    compute_dtype, out_dtype, _, save = rest[-4:]
    m, r = math.prod(x.shape[:-1]), down_weight.shape[1]
    y = allocate_result(x, up_weight, out_dtype)
    z = x.new_empty((m, r) if save else (0,), dtype=DTYPES[compute_dtype])
    stats = (m, 2) if save and norm_weight is not None else (0,)
    return y, z, x.new_empty(stats, dtype=torch.float32)


def _fake_backward(
    dy: Tensor, x: Tensor, z: Tensor, stats: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return allocate_gradients(dy, x, rest[: len(PARAMETERS)], rest[-1])


_FAKES: dict[str, Callable[..., Any]] = {
    "grouped_forward": _fake_forward,
    "grouped_backward": _fake_backward,
}


def _backward_flops(a: Mapping[str, Any]) -> int:
    return flops_of_gradients(math.prod(a["dy"].shape[:-1]), *widths(a), a["needs"], True)


FLOPS: dict[str, Formula] = {
    "grouped_forward": flops_of_forward,
    "grouped_backward": _backward_flops,
}


def define(library: torch.library.Library) -> None:
    """Declare the ops in ``library`` (schemas, fake kernels, autograd), without kernels."""
    schemas.define(library, SCHEMAS, _FAKES)
    ops = getattr(torch.ops, library.ns)

    def backward(ctx: Any, needs: Sequence[bool], dy: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_residual, *need, _, _ = needs
        op = ops.grouped_backward.default
        dx, *others = autograd.gradients(op, ctx, (dy,), (need_x, *need))
        return dx, dy if need_residual else None, *others, None, None

    autograd.register(library, "grouped_forward", backward, _reads)

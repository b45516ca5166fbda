"""A bottleneck for each row, of N whose parameters are stacked, as PyTorch operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd, schemas
from .bottleneck import (
    OPTIONS,
    PARAMETERS,
    declare,
    fake_backward,
    fake_forward,
    flops_of_backward,
    flops_of_forward,
    reads_of_adapter,
)
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
    of_x, of_parameters = reads_of_adapter((needs[0], *needs[2:-2]), norm, outputs[1].dim() == 2)
    return *of_x, *of_parameters, True


_FAKES: dict[str, Callable[..., Any]] = {
    "grouped_forward": fake_forward,
    "grouped_backward": fake_backward,
}

FLOPS: dict[str, Formula] = {
    "grouped_forward": flops_of_forward,
    "grouped_backward": flops_of_backward,
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

"""Sequence fusion as a PyTorch operator: schemas, fake kernels, autograd.

For M modalities every list has M tensors; an absent bias is an empty one. ``lengths`` [M, B] tells
how many tokens count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd, schemas, vmap
from .codes import DTYPES
from .flops import Formula

_PARAMETERS = (
    "Tensor[] down_weights, Tensor[] down_biases, Tensor[] time_factors, Tensor[] feature_factors,"
    " Tensor? lengths"
)
# Each x has the dtype of the products, compute_dtype, or is in fp32; so has y, of out_dtype.
_OPTIONS = "int activation, int compute_dtype, int out_dtype, bool summed, bool add_leading"

SCHEMAS = {
    "sequence_fusion_forward": f"(Tensor[] inputs, Tensor? residual, {_PARAMETERS}, {_OPTIONS},"
    " bool save) -> (Tensor y, Tensor products, Tensor z)",
    "sequence_fusion_backward": "(Tensor dy, Tensor[] inputs, Tensor products, Tensor z,"
    f" {_PARAMETERS}, {_OPTIONS}, int needs) -> Tensor[]",
}


def allocate_forward(
    inputs: Sequence[Tensor],
    down_weights: Sequence[Tensor],
    time_factors: Sequence[Tensor],
    feature_factors: Sequence[Tensor],
    compute_dtype: int,
    out_dtype: int,
    summed: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T_o, D]; P of every modality [B, R, T_o, r_m] laid end to end, in fp32; z of every
    modality [B, T_m, r_m] likewise, in the dtype of the products; empty if not to be saved.
    """
    x, items = inputs[0], inputs[0].shape[0]
    rank, _, length = time_factors[0].shape
    widths = [weight.shape[0] for weight in down_weights]
    y = x.new_empty((items, length, feature_factors[0].shape[2]), dtype=DTYPES[out_dtype])
    products = sum(widths) * items * (1 if summed else rank) * length if save else 0
    z = 0
    if save:
        z = sum(items * t.shape[1] * r for t, r in zip(inputs, widths, strict=True))
    return (
        y,
        x.new_empty(products, dtype=torch.float32),
        x.new_empty(z, dtype=DTYPES[compute_dtype]),
    )


def allocate_gradients(
    inputs: Sequence[Tensor], parameters: Sequence[Sequence[Tensor]], needs: int
) -> list[Tensor]:
    """A gradient for each x and each parameter whose bit is set in ``needs``; empty tensors else.

    parameters: the four lists of the schema.
    """
    tensors = [t for group in (inputs, *parameters) for t in group]
    return [t.new_empty(t.shape if needs >> i & 1 else (0,)) for i, t in enumerate(tensors)]


def _fake_forward(
    inputs: list[Tensor], residual: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    down_weights, _, time_factors, feature_factors = rest[:4]
    compute_dtype, out_dtype, summed, _, save = rest[-5:]
    return allocate_forward(
        inputs, down_weights, time_factors, feature_factors, compute_dtype, out_dtype, summed, save
    )


def _fake_backward(
    dy: Tensor, inputs: list[Tensor], products: Tensor, z: Tensor, *rest: Any
) -> list[Tensor]:
    return allocate_gradients(inputs, rest[:4], rest[-1])


_FAKES: dict[str, Callable[..., Any]] = {
    "sequence_fusion_forward": _fake_forward,
    "sequence_fusion_backward": _fake_backward,
}


def _reads(
    needs: Sequence[Any], tensors: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[Any]:
    """x is read where the gradient of its down-projection is wanted, biases never."""
    need_x, _, need_weights, need_biases, need_times, need_features, _ = needs
    of_z = any(map(any, (need_x, need_weights, need_biases, need_times)))
    every = [True] * len(need_x)
    return (
        need_weights,
        of_z or any(need_features),
        of_z,
        every,
        [False] * len(every),
        every,
        every,
        True,
    )


def _sizes(a: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Multiply-adds of each modality: of z, of P (= of dA) and of F (= of dU)."""
    (time_rank, _, out_len), d = a["time_factors"][0].shape, a["feature_factors"][0].shape[2]
    rank = 1 if a["summed"] else time_rank
    sizes = []
    for x, weight in zip(a["inputs"], a["down_weights"], strict=True):
        items, tokens, width = x.shape
        r = weight.shape[0]
        per_rank = items * rank * out_len * r
        sizes.append((items * tokens * width * r, per_rank * tokens, per_rank * d))
    return sizes


def _forward_flops(a: Mapping[str, Any]) -> int:
    return 2 * sum(sum(sizes) for sizes in _sizes(a))


def _backward_flops(a: Mapping[str, Any]) -> int:
    m, needs, has_z, total = len(a["inputs"]), a["needs"], a["z"].numel() > 0, 0
    for i, (of_z, of_p, of_f) in enumerate(_sizes(a)):
        x, weight, bias, time, feature = (bool(needs >> m * j + i & 1) for j in range(5))
        dz = x or weight or bias
        total += of_z * (x + weight + (not has_z and (dz or time)))
        total += of_p * (time + dz)
        total += of_f * (feature + (dz or time) + (m > 1))
    return 2 * total


FLOPS: dict[str, Formula] = {
    "sequence_fusion_forward": _forward_flops,
    "sequence_fusion_backward": _backward_flops,
}


def define(library: torch.library.Library) -> None:
    """Declare the ops in ``library`` (schemas, fake kernels, autograd), without kernels."""
    schemas.define(library, SCHEMAS, _FAKES)
    ops = getattr(torch.ops, library.ns)

    def backward(ctx: Any, needs: Sequence[Any], dy: Tensor) -> tuple[Any, ...]:
        need_x, need_residual, *need, _ = needs
        modalities = len(need_x)
        op = ops.sequence_fusion_backward.default
        wanted = [want for group in (need_x, *need) for want in group]
        flat = autograd.gradients(op, ctx, (dy,), wanted)
        dx, *others = (list(flat[i : i + modalities]) for i in range(0, 5 * modalities, modalities))
        return dx, dy if need_residual else None, *others, None

    autograd.register(library, "sequence_fusion_forward", backward, _reads)
    vmap.register(library, "sequence_fusion_backward")

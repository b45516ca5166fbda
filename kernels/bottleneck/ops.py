"""The ops: what is launched, on what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ...ops.bottleneck import (
    PARAMETERS,
    allocate_gradients,
    allocate_result,
    allocate_saved,
    asked_for,
)
from ...ops.codes import ACTIVATION_CODES, DTYPES
from ..launch import contiguous, guard, processors, triton_dtype
from ..rows import rows_of
from . import tiles
from .backward import backward_kernel
from .forward import forward_kernel
from .problem import problem
from .weights import reduce_kernel, weights_kernel

_TENSORS = len(PARAMETERS) + 1  # and the seed
# Of which h tells the derivative: where there is no LayerNorm it is kept in the place of z.
_KEEPING_H = (ACTIVATION_CODES["identity"], ACTIVATION_CODES["relu"])


def bottleneck_forward_out(
    y: Tensor,
    z: Tensor | None,
    stats: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    seed: Tensor | None,
    scale_value: float,
    norm_eps: float,
    dropout: float,
    input_dropout: float,
    activation: int,
    compute_dtype: int,
    out_dtype: int,
    add_x: bool,
    index: Tensor | None = None,
) -> None:
    """``fastadapters::bottleneck_forward_out``: fills y, and z and stats where given.

    z is what backward wants: h where that tells the derivative of the activation, too.
    Behind LayerNorm z is not filled: backward makes it once more. With an index [...], of the
    leading dimensions of x, parameters are stacked, and z and stats in the order of the adapters.
    """
    if x.numel() == 0:
        return
    p = problem(
        y, x.dtype, down_weight, up_weight, seed, (dropout, input_dropout), DTYPES[compute_dtype]
    )
    if add_x:
        residual = x
    down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, scale = contiguous(
        down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, scale
    )  # type: ignore[assignment]
    row_dims, rows = rows_of(x, x if residual is None else residual, y)
    with guard(p.device):
        if index is not None:
            p = p.grouped(len(down_weight), index, forward_kernel)
        p.launch(
            forward_kernel,
            p.tiles,
            x,
            residual,
            y,
            z if norm_weight is None else None,
            stats,
            x.new_empty(p.m, p.padded_r, dtype=p.dtype) if p.padded_r > p.block_r else None,
            down_weight,
            down_bias,
            up_weight,
            up_bias,
            norm_weight,
            None if p.input.seed is None else norm_bias,
            p.norm_products(down_weight, norm_weight, norm_bias),
            scale,
            p.groups.order,
            p.groups.tiles.table,
            p.hidden.seed,
            p.input.seed,
            scale_value,
            norm_eps,
            p.hidden.keep,
            p.input.keep,
            p.hidden.threshold,
            p.input.threshold,
            *p.sizes,
            *rows,
            ACTIVATION=activation,
            CHANNEL_SCALE=p.per_channel(scale),
            KEEPS_H=activation in _KEEPING_H,
            ROW_DIMS=row_dims,
        )


def bottleneck_backward_out(
    dx: Tensor | None,
    d_down_weight: Tensor | None,
    d_down_bias: Tensor | None,
    d_up_weight: Tensor | None,
    d_up_bias: Tensor | None,
    d_norm_weight: Tensor | None,
    d_norm_bias: Tensor | None,
    d_scale: Tensor | None,
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    stats: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    seed: Tensor | None,
    scale_value: float,
    norm_eps: float,
    dropout: float,
    input_dropout: float,
    activation: int,
    compute_dtype: int,
    out_dtype: int,
    add_x: bool,
    index: Tensor | None = None,
) -> None:
    """``fastadapters::bottleneck_backward_out``: fills what is not None.

    z: as saved by the forward; not used behind LayerNorm. index: as the forward's.
    """
    parameter_gradients = (
        d_down_weight,
        d_down_bias,
        d_up_weight,
        d_up_bias,
        d_norm_weight,
        d_norm_bias,
        d_scale,
    )
    if dy.numel() == 0:
        for gradient in parameter_gradients:
            if gradient is not None:
                gradient.zero_()
        return
    p = problem(
        dy, x.dtype, down_weight, up_weight, seed, (dropout, input_dropout), DTYPES[compute_dtype]
    )
    if x.numel() == 0:  # not needed
        x = dy
    if dy.stride(-1) != 1 or dy.dim() > 4:
        dy = dy.contiguous()
    if norm_weight is None:
        stats = None
    down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, scale = contiguous(
        down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, scale
    )  # type: ignore[assignment]

    needs_down_product = d_down_weight is not None or d_norm_weight is not None
    needs_offset = d_norm_bias is not None or (norm_bias is not None and d_down_weight is not None)
    needs_kept_product = needs_offset and p.input.seed is not None
    needs_down_product = needs_down_product or needs_kept_product
    needs_down_sum = d_down_bias is not None or (needs_offset and p.input.seed is None)
    needs_up_product = d_up_weight is not None or d_scale is not None
    needs_up_sum = d_up_bias is not None or (d_scale is not None and up_bias is not None)
    needs_dz = needs_down_product or needs_down_sum
    dz = h = None
    if needs_dz or (dx is not None and p.padded_r > p.block_r):
        dz = x.new_empty(p.m, p.padded_r, dtype=p.dtype)
    keeps_h = norm_weight is None and activation in _KEEPING_H
    kept_h = z if needs_up_product and keeps_h and p.r == p.padded_r else None  # laid out as h
    if needs_up_product and kept_h is None:
        h = x.new_empty(p.m, p.padded_r, dtype=p.dtype)

    blocks_r = p.padded_r // p.block_r
    # Two programs a processor with tiles of 128 columns; splits are whole tiles of any height.
    widest = max(p.d, p.d_out)
    tiles_of_columns = triton.cdiv(p.d, 128) + triton.cdiv(p.d_out, 128)
    most = max(1, 2 * processors(p.device) // (tiles_of_columns * blocks_r))
    rows_per_split = 128 * triton.cdiv(p.m, 128 * most)

    with guard(p.device):
        if index is not None:
            p = p.grouped(len(down_weight), index, backward_kernel, rows_per_split)
        groups = p.groups
        splits = triton.cdiv(p.m, rows_per_split)
        if groups.splits.table is not None:
            splits = len(groups.splits.table)
        channel_scale = p.per_channel(scale)
        if dx is not None or dz is not None or h is not None:
            row_dims, rows = rows_of(dy, x, x if dx is None else dx)
            p.launch(
                backward_kernel,
                p.tiles,
                dy,
                x,
                dx,
                dz,
                h,
                z if norm_weight is None else None,
                stats,
                down_weight,
                down_bias,
                up_weight,
                norm_weight,
                None if p.input.seed is None else norm_bias,
                p.norm_products(down_weight, norm_weight, norm_bias),
                scale,
                groups.order,
                groups.tiles.table,
                p.hidden.seed,
                p.input.seed,
                scale_value,
                p.hidden.keep,
                p.input.keep,
                p.hidden.threshold,
                p.input.threshold,
                *p.sizes,
                *rows,
                ACTIVATION=activation,
                CHANNEL_SCALE=channel_scale,
                KEEPS_H=keeps_h,
                ADD_X=add_x,
                ROW_DIMS=row_dims,
            )
        if all(gradient is None for gradient in parameter_gradients):
            return

        def partial(needed: bool, *shape: int) -> Tensor | None:
            return x.new_empty(splits, *shape, dtype=torch.float32) if needed else None

        partials = (
            partial(needs_down_product, p.d, p.padded_r),
            partial(needs_kept_product, p.d, p.padded_r),
            partial(needs_down_sum, p.padded_r),
            partial(needs_up_product, p.d_out, p.padded_r),
            partial(needs_up_sum, p.d_out),
        )
        row_dims, rows = rows_of(dy, x)
        p.launch(
            weights_kernel,
            lambda meta: (triton.cdiv(widest, meta["BLOCK_D"]), 2 * blocks_r, splits),
            dy,
            x,
            dz,
            kept_h if h is None else h,
            stats,
            groups.order,
            groups.splits.table,
            p.input.seed,
            p.input.threshold,
            *partials,
            *p.sizes[:3],
            *rows,
            rows_per_split,
            ROW_DIMS=row_dims,
        )
        d_scales = d_scale
        if d_scale is not None and not channel_scale:
            d_scales = x.new_empty(groups.adapters, p.d_out, dtype=torch.float32)
        reduce_kernel[triton.cdiv(widest, tiles.REDUCE_BLOCK_D), groups.adapters](
            *partials,
            down_weight,
            up_weight,
            up_bias,
            norm_weight,
            norm_bias,
            scale,
            *parameter_gradients[:-1],
            d_scales,
            scale_value,
            None if p.input.seed is None else p.input.keep,
            groups.splits.firsts,
            splits,
            *p.sizes[1:],
            DTYPE=triton_dtype(p.dtype),
            X_DTYPE=triton_dtype(p.x_dtype),
            CHANNEL_SCALE=channel_scale,
            R=p.padded_r,
            BLOCK_R=p.block_r,
            BLOCK_D=tiles.REDUCE_BLOCK_D,
            num_warps=tiles.reduce_warps(groups.order is not None),
        )
        if d_scale is not None and not channel_scale:
            d_scale.copy_(d_scales.sum(1))


def _forward(
    x: Tensor, residual: Tensor | None, inputs: Sequence[Any], save: bool, index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    down_weight, up_weight, norm_weight = inputs[0], inputs[2], inputs[4]
    compute_dtype, out_dtype, _ = inputs[-3:]
    y = allocate_result(x, up_weight, out_dtype)
    z, stats = allocate_saved(x, down_weight, norm_weight, compute_dtype, save)
    if norm_weight is not None:  # as on a GPU, where an interpreter runs on the CPU
        z = x.new_empty(0)
    saved = (t if t.numel() else None for t in (z, stats))
    bottleneck_forward_out(y, *saved, x, residual, *inputs, index)
    return y, z, stats


def bottleneck_forward(
    x: Tensor, residual: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastadapters::bottleneck_forward``."""
    *inputs, save = rest
    return _forward(x, residual, inputs, save, None)


def grouped_forward(
    x: Tensor, residual: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastadapters::grouped_forward``."""
    *tensors, index = rest[: _TENSORS + 1]
    *options, save = rest[_TENSORS + 1 :]
    return _forward(x, residual, (*tensors, *options), save, index)


def _backward(
    dy: Tensor, x: Tensor, saved: Sequence[Tensor], inputs: Sequence[Any], needs: int,
    index: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    parameters = inputs[: len(PARAMETERS)]
    gradients = allocate_gradients(dy, x, parameters, needs)
    wanted = asked_for(gradients, parameters, needs)
    bottleneck_backward_out(*wanted, dy, x, *saved, *inputs, index)
    return gradients


def bottleneck_backward(
    dy: Tensor, x: Tensor, z: Tensor, stats: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """``fastadapters::bottleneck_backward``."""
    *inputs, needs = rest
    return _backward(dy, x, (z, stats), inputs, needs, None)


def grouped_backward(
    dy: Tensor, x: Tensor, z: Tensor, stats: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """``fastadapters::grouped_backward``."""
    *tensors, index = rest[: _TENSORS + 1]
    *options, needs = rest[_TENSORS + 1 :]
    return _backward(dy, x, (z, stats), (*tensors, *options), needs, index)

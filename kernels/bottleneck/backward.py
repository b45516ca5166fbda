"""The pass over dy of backward, and over x where there is LayerNorm."""

from __future__ import annotations

import triton
import triton.language as tl

from ..activations import RELU, activate, activation_backward
from ..dropout import survivors
from ..products import contract, expand
from ..rows import load_stats, load_vector, row_offsets, rows_at, sum_of_products
from .groups import load_run
from .pre_activation import pre_activation


@triton.jit
def d_input(
    dz,
    stored,
    places,
    rows,
    in_rows,
    down_weight,
    D,
    cols,
    inside,
    r,
    input_seed,
    input_keep,
    input_threshold,
    first,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of the columns ``cols``, from ``first`` on, of what dropout in front takes."""
    out = expand(
        dz, stored, places, in_rows, down_weight, D, 1, cols, inside, r, R, PRECISION, BLOCK_R
    )
    if input_seed is not None:
        kept = survivors(input_seed, rows, first, D, input_threshold, 1, BLOCK_D)
        out = tl.where(kept, out * input_keep, 0.0)
    return out


@triton.jit(do_not_specialize=["M", "n1", "n2", "threshold", "input_threshold"])
def backward_kernel(
    dy,
    x,
    dx,
    dz_out,
    h_out,
    z_in,
    stats,
    down_weight,
    down_bias,
    up_weight,
    norm_weight,
    norm_bias,
    norm_products,
    scale,
    order,
    table,
    seed,
    input_seed,
    scale_value,
    keep_scale,
    input_keep,
    threshold: tl.uint32,
    input_threshold: tl.uint32,
    M,
    D,
    D_out,
    r,
    n1,
    n2,
    dy_stride0,
    dy_stride1,
    dy_stride2,
    x_stride0,
    x_stride1,
    x_stride2,
    dx_stride0,
    dx_stride1,
    dx_stride2,
    ACTIVATION: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr,
    KEEPS_H: tl.constexpr,
    ADD_X: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx, and dz and h [M, R] for the weights' gradients; each where its pointer is not None.

    z is what the forward saved, [M, r], with KEEPS_H h; with LayerNorm, whose gradient reads x, it
    is made of x.
    Where a tile is one of a table's, of rows of one adapter, z, stats, dz and h are in its order.
    """
    width = D if D_out is None else D_out
    begin = tl.program_id(0).to(M.dtype) * BLOCK_M
    end = M
    if table is not None:
        adapter, begin, end = load_run(table, tl.program_id(0), M)
        if begin == end:
            return
        own = tl.maximum(adapter, 0)
        down_weight += own * (r * D)
        up_weight += own * (r * width)
        down_bias = None if down_bias is None else down_bias + own * r
        norm_weight = None if norm_weight is None else norm_weight + own * D
        norm_bias = None if norm_bias is None else norm_bias + own * D
        norm_products = None if norm_products is None else norm_products + own * (2 * R)
        scale = None if scale is None else scale + own * (width if CHANNEL_SCALE else 1)
    places = begin + tl.arange(0, BLOCK_M)
    in_rows = places < end
    rows = rows_at(order, places, in_rows)
    x_rows = row_offsets(rows, n1, n2, x_stride0, x_stride1, x_stride2, ROW_DIMS)
    dy_rows = row_offsets(rows, n1, n2, dy_stride0, dy_stride1, dy_stride2, ROW_DIMS)
    mean = None
    rstd = None
    if norm_weight is not None:
        mean, rstd = load_stats(stats, places, in_rows)
        along_ones = tl.zeros([BLOCK_M], tl.float32)
        along_x = tl.zeros([BLOCK_M], tl.float32)

    dz = tl.zeros([BLOCK_M, BLOCK_R], DTYPE)
    for first in range(0, R, BLOCK_R):
        units = first + tl.arange(0, BLOCK_R)
        tile = places.to(tl.int64)[:, None] * R + units[None, :]
        if dx is not None or dz_out is not None:
            gain = scale if CHANNEL_SCALE else None
            dh = contract(
                dy, dy_rows, in_rows, None, None, None, up_weight, 1, r, gain, units, width,
                r, DTYPE, PRECISION, BLOCK_D,
            )  # fmt: skip
            if scale is None:
                dh *= scale_value
            elif not CHANNEL_SCALE:
                dh *= tl.load(scale).to(DTYPE).to(tl.float32)
        if norm_weight is not None:
            z, centred = pre_activation(
                x, x_rows, in_rows, mean, rstd, down_weight, down_bias, norm_weight, norm_bias,
                norm_products, input_seed, input_keep, input_threshold, rows, units, D, r, R, DTYPE,
                PRECISION, BLOCK_D,
            )  # fmt: skip
        else:
            z = tl.load(
                z_in + places.to(tl.int64)[:, None] * r + units[None, :],
                mask=in_rows[:, None] & (units < r)[None, :],
                other=0.0,
            ).to(tl.float32)
        kept = (units < r)[None, :]  # beyond r z or dh is NaN where x or dy is infinite
        if seed is not None and not (KEEPS_H and ACTIVATION == RELU):  # whose zeros tell
            kept &= survivors(seed, rows, first, r, threshold, 0, BLOCK_R)
        if h_out is not None:
            h = z
            if not KEEPS_H:
                h = tl.where(kept, activate(z, ACTIVATION) * keep_scale, 0.0)
            tl.store(h_out + tile, h.to(DTYPE), mask=in_rows[:, None])
        if dx is not None or dz_out is not None:
            dz = tl.where(kept, activation_backward(dh, z, ACTIVATION) * keep_scale, 0.0).to(DTYPE)
            if dz_out is not None:
                tl.store(dz_out + tile, dz, mask=in_rows[:, None])
            if norm_weight is not None and input_seed is None:
                # With g = dz Wd the gradient of norm(x), LayerNorm's backward needs the sums over D
                # of g gamma and of g gamma (x - mean) rstd: they are dz . (Wd gamma) and dz . z
                # without its offsets, which spares a pass over D.
                wide = dz.to(tl.float32)
                gain = tl.load(norm_products + units)
                along_ones += sum_of_products(wide, gain[None, :], 1)
                along_x += sum_of_products(wide, centred, 1)

    if dx is not None:
        if R > BLOCK_R:
            tl.debug_barrier()
        if norm_weight is not None and input_seed is not None:
            # What dropout keeps differs from row to row: the pass over D it is.
            for k in range(0, D, BLOCK_D):
                cols = k + tl.arange(0, BLOCK_D)
                inside = cols < D
                out = d_input(
                    dz, dz_out, places, rows, in_rows, down_weight, D, cols, inside, r, input_seed,
                    input_keep, input_threshold, k, R, PRECISION, BLOCK_R, BLOCK_D,
                )  # fmt: skip
                gain = load_vector(norm_weight, cols, inside, x.dtype.element_ty)[None, :]
                a = tl.load(
                    x + x_rows[:, None] + cols[None, :],
                    mask=in_rows[:, None] & inside[None, :],
                    other=0.0,
                )
                normed = (a.to(tl.float32) - mean[:, None]) * rstd[:, None]
                along_ones += sum_of_products(out, gain, 1)
                along_x += sum_of_products(out * gain, normed, 1)
        dx_rows = row_offsets(rows, n1, n2, dx_stride0, dx_stride1, dx_stride2, ROW_DIMS)
        for k in range(0, D, BLOCK_D):
            cols = k + tl.arange(0, BLOCK_D)
            inside = cols < D
            whole = in_rows[:, None] & inside[None, :]
            if ADD_X:
                added = tl.load(dy + dy_rows[:, None] + cols[None, :], mask=whole, other=0.0)
            if norm_weight is not None:
                a = tl.load(x + x_rows[:, None] + cols[None, :], mask=whole, other=0.0)
            out = d_input(
                dz, dz_out, places, rows, in_rows, down_weight, D, cols, inside, r, input_seed,
                input_keep, input_threshold, k, R, PRECISION, BLOCK_R, BLOCK_D,
            )  # fmt: skip
            if norm_weight is not None:
                normed = (a.to(tl.float32) - mean[:, None]) * rstd[:, None]
                out *= load_vector(norm_weight, cols, inside, x.dtype.element_ty)[None, :]
                out -= (along_ones[:, None] + normed * along_x[:, None]) / D
                out *= rstd[:, None]
            if table is not None:
                out = tl.where(adapter >= 0, out, 0.0)
            if ADD_X:
                out += added.to(tl.float32)
            tl.store(dx + dx_rows[:, None] + cols[None, :], out.to(dx.dtype.element_ty), mask=whole)

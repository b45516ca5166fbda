"""The forward pass in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from ..activations import activate
from ..dropout import survivors
from ..products import expand
from ..rows import load_vector, moments, row_offsets, rows_at
from .groups import load_run
from .pre_activation import pre_activation


@triton.jit(do_not_specialize=["M", "n1", "n2", "threshold", "input_threshold"])
def forward_kernel(
    x,
    residual,
    y,
    z_out,
    stats,
    hidden,
    down_weight,
    down_bias,
    up_weight,
    up_bias,
    norm_weight,
    norm_bias,
    norm_products,
    scale,
    order,
    table,
    seed,
    input_seed,
    scale_value,
    norm_eps,
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
    x_stride0,
    x_stride1,
    x_stride2,
    residual_stride0,
    residual_stride1,
    residual_stride2,
    y_stride0,
    y_stride1,
    y_stride2,
    ACTIVATION: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr,
    KEEPS_H: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y, and what backward wants; seeds are None where nothing is dropped, D_out where it is D.

    z_out: z, or with KEEPS_H h, which tells the derivative of the activation, too.
    Where a tile is one of a table's, of rows of one adapter, z, stats and hidden are in its order.
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
        up_bias = None if up_bias is None else up_bias + own * width
        norm_weight = None if norm_weight is None else norm_weight + own * D
        norm_bias = None if norm_bias is None else norm_bias + own * D
        norm_products = None if norm_products is None else norm_products + own * (2 * R)
        scale = None if scale is None else scale + own * (width if CHANNEL_SCALE else 1)
    places = begin + tl.arange(0, BLOCK_M)
    in_rows = places < end
    rows = rows_at(order, places, in_rows)
    x_rows = row_offsets(rows, n1, n2, x_stride0, x_stride1, x_stride2, ROW_DIMS)
    mean = None
    rstd = None
    if norm_weight is not None:
        mean, variance = moments(x, x_rows, in_rows, D, BLOCK_D)
        rstd = tl.rsqrt(variance + norm_eps)
        if stats is not None:
            pair = stats + places.to(tl.int64) * 2
            tl.store(pair, mean, mask=in_rows)
            tl.store(pair + 1, rstd, mask=in_rows)

    h = tl.zeros([BLOCK_M, BLOCK_R], DTYPE)
    for first in range(0, R, BLOCK_R):
        units = first + tl.arange(0, BLOCK_R)
        z, _ = pre_activation(
            x, x_rows, in_rows, mean, rstd, down_weight, down_bias, norm_weight, norm_bias,
            norm_products, input_seed, input_keep, input_threshold, rows, units, D, r, R, DTYPE,
            PRECISION, BLOCK_D,
        )  # fmt: skip
        tile = places.to(tl.int64)[:, None] * r + units[None, :]
        in_tile = in_rows[:, None] & (units < r)[None, :]
        if z_out is not None and not KEEPS_H:
            tl.store(z_out + tile, z.to(DTYPE), mask=in_tile)
        active = activate(z, ACTIVATION)
        kept = (units < r)[None, :]  # beyond r z is NaN where x is infinite
        if seed is not None:
            kept &= survivors(seed, rows, first, r, threshold, 0, BLOCK_R)
            active *= keep_scale
        h = tl.where(kept, active, 0.0).to(DTYPE)
        if z_out is not None and KEEPS_H:
            tl.store(z_out + tile, h, mask=in_tile)
        if R > BLOCK_R:
            tl.store(
                hidden + places.to(tl.int64)[:, None] * R + units[None, :], h, mask=in_rows[:, None]
            )
    if R > BLOCK_R:
        tl.debug_barrier()

    s = scale_value
    if scale is not None and not CHANNEL_SCALE:
        s = tl.load(scale).to(DTYPE).to(tl.float32)
    y_rows = row_offsets(rows, n1, n2, y_stride0, y_stride1, y_stride2, ROW_DIMS)
    if residual is not None:
        residual_rows = row_offsets(
            rows, n1, n2, residual_stride0, residual_stride1, residual_stride2, ROW_DIMS
        )
    for k in range(0, width, BLOCK_D):
        cols = k + tl.arange(0, BLOCK_D)
        inside = cols < width
        whole = in_rows[:, None] & inside[None, :]
        if residual is not None:
            added = tl.load(
                residual + residual_rows[:, None] + cols[None, :], mask=whole, other=0.0
            )
        out = expand(
            h, hidden, places, in_rows, up_weight, 1, r, cols, inside, r, R, PRECISION, BLOCK_R
        )
        if up_bias is not None:
            out += load_vector(up_bias, cols, inside, DTYPE)[None, :]
        if CHANNEL_SCALE:
            out *= load_vector(scale, cols, inside, DTYPE)[None, :]
        else:
            out *= s
        if residual is not None:
            out += added.to(tl.float32)
        if table is not None:
            out = tl.where(adapter >= 0, out, float("nan"))
        tl.store(y + y_rows[:, None] + cols[None, :], out.to(y.dtype.element_ty), mask=whole)

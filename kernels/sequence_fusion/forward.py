"""Forward: the combined tokens P of each modality, then the product over the modalities."""

from __future__ import annotations

import triton
import triton.language as tl

from ..activations import activate
from ..products import contract
from .modalities import (
    counted,
    even,
    factor_product,
    locate,
    pick,
    pick_stride,
    products_start,
    start_of,
    time_factor,
    z_start,
)


@triton.jit(do_not_specialize=["B", "tiles"])
def combine_kernel(
    xs,
    down_weights,
    down_biases,
    time_factors,
    lengths,
    partials,
    z,
    partial_stride,
    counts,
    tokens,
    dims,
    widths,
    factor_tokens,
    item_strides,
    token_strides,
    B,
    tiles,
    ranks,
    To,
    rank_out,
    BIASES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SUMMED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z and A^T act(z) of BLOCK_M tokens of an item: one of the partial sums of P."""
    b = tl.program_id(0) // tiles
    m, tile = locate(tl.program_id(0) % tiles, counts)
    T, D, r = even(pick(tokens, m)), pick(dims, m), pick(widths, m)
    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_t = t < counted(lengths, m, b, B, T)
    item = tl.cast(b, tl.int64)
    rows = item * pick_stride(item_strides, m) + t.to(tl.int64) * pick_stride(token_strides, m)
    sums = (
        partials + tl.cast(tile, tl.int64) * partial_stride + products_start(m, widths, B, rank_out)
    )
    for first in range(0, R, BLOCK_R):
        units = first + tl.arange(0, BLOCK_R)
        inside = units < r
        active = contract(
            pick(xs, m), rows, in_t, None, None, None, pick(down_weights, m), D, 1, None, units,
            D, r, DTYPE, PRECISION, BLOCK_D,
        )  # fmt: skip
        if down_biases is not None:
            given = units < r * ((BIASES >> m) & 1)
            bias = tl.load(pick(down_biases, m) + units, mask=given, other=0.0)
            active += bias.to(DTYPE).to(tl.float32)[None, :]
        mask = in_t[:, None] & inside[None, :]
        if z is not None:
            z_rows = z + z_start(m, tokens, widths, B) + (item * T + t) * r
            tl.store(z_rows[:, None] + units[None, :], active.to(DTYPE), mask=mask)
        h = tl.where(mask, activate(active, ACTIVATION), 0.0).to(DTYPE)
        for o in range(0, rank_out, BLOCK_O):
            columns = o + tl.arange(0, BLOCK_O)
            factor = time_factor(
                pick(time_factors, m), t, in_t, columns, ranks, pick(factor_tokens, m), To,
                rank_out, SUMMED, DTYPE,
            )  # fmt: skip
            p = tl.dot(tl.trans(factor), h, input_precision=PRECISION)
            p_rows = sums + (item * rank_out + columns) * r
            tl.store(
                p_rows[:, None] + units[None, :],
                p,
                mask=(columns < rank_out)[:, None] & inside[None, :],
            )


@triton.jit(do_not_specialize=["N", "B"])
def fuse_kernel(
    partials,
    products,
    residual,
    xs,
    feature_factors,
    lengths,
    y,
    partial_stride,
    partial_counts,
    tokens,
    dims,
    widths,
    item_strides,
    token_strides,
    residual_stride0,
    residual_stride1,
    N,
    B,
    rank,
    ranks,
    To,
    D,
    ADD_LEADING: tl.constexpr,
    SUMMED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y of BLOCK_M of the N = B T_o rows; P summed up on the way, and kept where it has to be."""
    n = tl.program_id(0).to(N.dtype) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = n < N
    item = (n // To).to(tl.int64)
    o = n % To
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    whole = in_rows[:, None] & (cols < D)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if residual is not None:
        places = item * residual_stride0 + o.to(tl.int64) * residual_stride1
        total += tl.load(residual + places[:, None] + cols[None, :], mask=whole, other=0.0)
    if ADD_LEADING:
        begin = tl.zeros([BLOCK_M], tl.int32)
        for i in tl.static_range(len(xs)):
            end = begin + counted(lengths, i, tl.minimum(item, B - 1), B, even(tokens[i]))
            mine = in_rows & (o >= begin) & (o < end)
            t = (o - begin).to(tl.int64)
            places = item * item_strides[i] + t * token_strides[i]
            leading = tl.load(
                xs[i] + places[:, None] + cols[None, :],
                mask=mine[:, None] & (cols < tl.minimum(D, dims[i]))[None, :],
                other=0.0,
            )
            total += leading.to(tl.float32)
            begin = end
    keep = n < tl.where(tl.program_id(1) == 0, N, 0)
    for q in range(rank):
        rows = (item * rank + q) * To + o
        product = tl.full([BLOCK_M, BLOCK_D], 1.0, tl.float32)
        for m in range(len(widths)):
            r = pick(widths, m)
            product *= factor_product(
                partials, partial_stride, even(pick(partial_counts, m)), products, keep,
                start_of(m, widths) * N * rank + rows * r, in_rows, pick(feature_factors, m), q,
                cols, ranks, r, D, SUMMED, DTYPE, PRECISION, R, BLOCK_R,
            )  # fmt: skip
        total += product
    tl.store(
        y + n.to(tl.int64)[:, None] * D + cols[None, :], total.to(y.dtype.element_ty), mask=whole
    )

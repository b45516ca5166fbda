"""Backward: of the products over the modalities, of the tokens, of the inputs."""

from __future__ import annotations

import triton
import triton.language as tl

from ..activations import activate, activation_backward
from .modalities import (
    counted,
    even,
    factor_product,
    feature_factor,
    locate,
    pick,
    pick_stride,
    products_start,
    start_of,
    sum_slabs,
    time_factor,
    z_start,
)


@triton.jit(do_not_specialize=["N", "chunk"])
def factors_kernel(
    dy,
    products,
    feature_factors,
    d_products,
    feature_slabs,
    d_products_stride,
    feature_slab_size,
    widths,
    dy_stride0,
    dy_stride1,
    N,
    chunk,
    rank,
    ranks,
    To,
    D,
    TIMES: tl.constexpr,
    FEATURES: tl.constexpr,
    SUMMED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """From BLOCK_M rows of dy: dP over a chunk of columns, and the part of dU, of one rank.

    Of the modalities whose bits are set in TIMES (dP) and FEATURES (dU), each in programs of its
    own. The factors F = P U of all the others are formed again and multiplied: no division.
    """
    n = tl.program_id(0).to(N.dtype) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = n < N
    item = (n // To).to(tl.int64)
    o = n % To
    blocks: tl.constexpr = R // BLOCK_R
    m = tl.program_id(1) // (rank * blocks)
    q = tl.program_id(1) // blocks % rank
    units = tl.program_id(1) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    r = pick(widths, m)
    inside = units < r
    rows = (item * rank + q) * To + o
    dy_rows = item * dy_stride0 + o.to(tl.int64) * dy_stride1
    places = (start_of(m, widths) * N * rank + rows * r)[:, None] + units[None, :]
    whole = in_rows[:, None] & inside[None, :]
    p = tl.load(products + places, mask=whole, other=0.0).to(DTYPE)
    slab = feature_slabs
    if FEATURES:
        slab += tl.cast(tl.program_id(0), tl.int64) * feature_slab_size
        slab += (start_of(m, widths) * rank + tl.cast(q, tl.int64) * r) * D
    d_product = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    begin = tl.program_id(2) * chunk
    for k in range(begin, tl.minimum(begin + chunk, D), BLOCK_D):
        cols = k + tl.arange(0, BLOCK_D)
        in_cols = cols < D
        g = tl.load(
            dy + dy_rows[:, None] + cols[None, :],
            mask=in_rows[:, None] & in_cols[None, :],
            other=0.0,
        ).to(tl.float32)
        for i in range(len(widths) - 1):
            other = i + (i >= m).to(tl.int32)
            width = pick(widths, other)
            g *= factor_product(
                products, 0, 1, None, None, start_of(other, widths) * N * rank + rows * width,
                in_rows, pick(feature_factors, other), q, cols, ranks, width, D,
                SUMMED, DTYPE, PRECISION, R, BLOCK_R,
            )  # fmt: skip
        d_factor = g.to(DTYPE)
        if FEATURES:
            d_feature = tl.dot(tl.trans(p), d_factor, input_precision=PRECISION)
            wanted = units < r * ((FEATURES >> m) & 1)
            tl.store(
                slab + units[:, None].to(tl.int64) * D + cols[None, :],
                d_feature,
                mask=wanted[:, None] & in_cols[None, :],
            )
        if TIMES:
            u = feature_factor(pick(feature_factors, m), q, units, cols, ranks, r, D, SUMMED, DTYPE)
            d_product = tl.dot(d_factor, tl.trans(u), d_product, input_precision=PRECISION)
    if TIMES:
        sums = d_products + tl.cast(tl.program_id(2), tl.int64) * d_products_stride
        tl.store(sums + places, d_product, mask=whole)


@triton.jit(do_not_specialize=["B", "group", "chunks"])
def tokens_kernel(
    z,
    d_products,
    time_factors,
    lengths,
    dz,
    time_slabs,
    d_products_stride,
    time_slab_size,
    counts,
    tokens,
    widths,
    factor_tokens,
    B,
    group,
    chunks,
    ranks,
    To,
    rank_out,
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
    """Of BLOCK_M tokens of a group of items: dz, and the sum over the group of dA = h dP^T.

    A program forms BLOCK_O of dA's columns, the first of them dz too; each where its pointer is not
    None.
    """
    m, tile = locate(tl.program_id(0), counts)
    T, r, length = even(pick(tokens, m)), pick(widths, m), pick(factor_tokens, m)
    a = pick(time_factors, m)
    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    own = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    begin = tl.program_id(1) * group
    d_factor = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for b in range(begin, tl.minimum(begin + group, B)):
        in_t = t < counted(lengths, m, b, B, T)
        item = tl.cast(b, tl.int64)
        z_rows = z_start(m, tokens, widths, B) + (item * T + t) * r
        sums = d_products + products_start(m, widths, B, rank_out) + item * rank_out * r
        for first in range(0, R, BLOCK_R):
            units = first + tl.arange(0, BLOCK_R)
            inside = (units < r)[None, :]
            mask = in_t[:, None] & inside
            places = z_rows[:, None] + units[None, :]
            active = tl.load(z + places, mask=mask, other=0.0).to(tl.float32)
            d_product = sum_slabs(
                sums, d_products_stride, chunks,
                own[:, None].to(tl.int64) * r + units[None, :], (own < rank_out)[:, None] & inside,
            ).to(DTYPE)  # fmt: skip
            if time_slabs is not None:
                h = tl.where(mask, activate(active, ACTIVATION), 0.0).to(DTYPE)
                d_factor = tl.dot(h, tl.trans(d_product), d_factor, input_precision=PRECISION)
            if dz is not None and tl.program_id(2) == 0:
                factor = time_factor(a, t, in_t, own, ranks, length, To, rank_out, SUMMED, DTYPE)
                dh = tl.dot(factor, d_product, input_precision=PRECISION)
                for o in range(BLOCK_O, rank_out, BLOCK_O):
                    others = o + tl.arange(0, BLOCK_O)
                    d_product = sum_slabs(
                        sums, d_products_stride, chunks,
                        others[:, None].to(tl.int64) * r + units[None, :],
                        (others < rank_out)[:, None] & inside,
                    ).to(DTYPE)  # fmt: skip
                    factor = time_factor(
                        a, t, in_t, others, ranks, length, To, rank_out, SUMMED, DTYPE
                    )
                    dh = tl.dot(factor, d_product, dh, input_precision=PRECISION)
                out = activation_backward(dh, active, ACTIVATION)
                tl.store(dz + places, out.to(DTYPE), mask=mask)
    if time_slabs is not None:
        slab = time_slabs + tl.cast(tl.program_id(1), tl.int64) * time_slab_size
        slab += start_of(m, factor_tokens) * rank_out
        offsets = tl.cast(own // To, tl.int64) * length * To + own % To
        tl.store(
            slab + t[:, None].to(tl.int64) * To + offsets[None, :],
            d_factor,
            mask=(t < length)[:, None] & (own < rank_out)[None, :],
        )


@triton.jit(do_not_specialize=["B", "share"])
def inputs_kernel(
    xs,
    dxs,
    dz,
    dy,
    down_weights,
    lengths,
    weight_slabs,
    bias_slabs,
    weight_slab_size,
    bias_slab_size,
    counts,
    tokens,
    dims,
    widths,
    item_strides,
    token_strides,
    dy_stride0,
    dy_stride1,
    B,
    share,
    To,
    INPUTS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BIASES: tl.constexpr,
    ADD_LEADING: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx of BLOCK_D columns, and the parts of dWd and db, over `share` tiles of BLOCK_M tokens.

    Of the modalities whose bits are set in INPUTS, WEIGHTS and BIASES. x is read here only: the
    same tile of dz goes into both products.
    """
    m, program = locate(tl.program_id(0), counts)
    T, D, r = even(pick(tokens, m)), pick(dims, m), pick(widths, m)
    columns = tl.cdiv(D, BLOCK_D)
    blocks: tl.constexpr = R // BLOCK_R
    cols = program % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    block = program // columns % blocks
    split = program // columns // blocks
    units = block * BLOCK_R + tl.arange(0, BLOCK_R)
    inside, in_cols = units < r, cols < D
    x, w = pick(xs, m), pick(down_weights, m)
    item_stride, token_stride = pick_stride(item_strides, m), pick_stride(token_strides, m)
    z_rows = z_start(m, tokens, widths, B)
    tiles = tl.cdiv(T, BLOCK_M)
    begin = split * share
    end = tl.minimum(begin + share, tiles * B)
    product = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for j in range(begin, end):
        b = j // tiles
        item = tl.cast(b, tl.int64)
        t = j % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        length = counted(lengths, m, b, B, T)
        in_t = t < length
        places = z_rows + (item * T + t) * r
        dz_tile = tl.load(
            dz + places[:, None] + units[None, :], mask=in_t[:, None] & inside[None, :], other=0.0
        )
        if WEIGHTS:
            rows = item * item_stride + t.to(tl.int64) * token_stride
            x_tile = tl.load(
                x + rows[:, None] + cols[None, :], mask=in_t[:, None] & in_cols[None, :], other=0.0
            )
            product = tl.dot(
                tl.trans(dz_tile), x_tile.to(DTYPE), product, input_precision=PRECISION
            )
        if INPUTS and block == 0:
            dx = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for first in range(0, R, BLOCK_R):
                others = first + tl.arange(0, BLOCK_R)
                part = dz_tile
                if R > BLOCK_R:
                    part = tl.load(
                        dz + places[:, None] + others[None, :],
                        mask=in_t[:, None] & (others < r)[None, :],
                        other=0.0,
                    )
                weight = tl.load(
                    w + others[:, None].to(tl.int64) * D + cols[None, :],
                    mask=(others < r)[:, None] & in_cols[None, :],
                    other=0.0,
                ).to(DTYPE)
                dx = tl.dot(part, weight, dx, input_precision=PRECISION)
            if ADD_LEADING:
                o = t
                for i in tl.static_range(len(tokens) - 1):
                    if i < m:
                        o += counted(lengths, i, b, B, even(tokens[i]))
                dy_rows = item * dy_stride0 + o.to(tl.int64) * dy_stride1
                dx += tl.load(
                    dy + dy_rows[:, None] + cols[None, :],
                    mask=(in_t & (o < To))[:, None] & in_cols[None, :],
                    other=0.0,
                ).to(tl.float32)
            out = pick(dxs, m) + ((item * T + t) * D)[:, None] + cols[None, :]
            wanted = t < T * ((INPUTS >> m) & 1)
            tl.store(out, dx.to(out.dtype.element_ty), mask=wanted[:, None] & in_cols[None, :])
    if WEIGHTS:
        slab = weight_slabs + tl.cast(split, tl.int64) * weight_slab_size
        for i in tl.static_range(len(dims) - 1):
            if i < m:
                slab += tl.cast(dims[i], tl.int64) * widths[i]
        tl.store(
            slab + units[:, None].to(tl.int64) * D + cols[None, :],
            product,
            mask=inside[:, None] & in_cols[None, :],
        )
    if BIASES and program % columns == 0:
        total = tl.zeros([BLOCK_R], tl.float32)
        for j in range(begin, end):
            item = tl.cast(j // tiles, tl.int64)
            t = j % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
            in_t = t < counted(lengths, m, j // tiles, B, T)
            places = z_rows + (item * T + t) * r
            dz_tile = tl.load(
                dz + places[:, None] + units[None, :],
                mask=in_t[:, None] & inside[None, :],
                other=0.0,
            )
            total += tl.sum(dz_tile.to(tl.float32), 0)
        slab = bias_slabs + tl.cast(split, tl.int64) * bias_slab_size
        tl.store(slab + start_of(m, widths) + units, total, mask=inside)


@triton.jit
def reduce_kernel(
    slabs,
    gradients,
    slab_sizes,
    slab_counts,
    sizes,
    ranks,
    WANTED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add slabs in order: slabs[kind] [count, all modalities' gradients], into gradients[kind][m].

    Bit m of WANTED[kind] is set where the gradient is wanted; `ranks` copies of it are written.
    """
    modalities: tl.constexpr = len(sizes[0])
    for i in tl.static_range(len(slabs)):
        if WANTED[i]:
            m = tl.program_id(1) - modalities * i
            if (m >= 0) & (m < modalities) & (((WANTED[i] >> m) & 1) == 1):
                size = pick(sizes[i], m)
                places = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
                mask = places < size
                total = sum_slabs(
                    slabs[i] + start_of(m, sizes[i]), slab_sizes[i],
                    even(pick(slab_counts[i], m)), places, mask,
                )  # fmt: skip
                out = pick(gradients[i], m)
                for q in range(ranks[i]):
                    tl.store(
                        out + tl.cast(q, tl.int64) * size + places,
                        total.to(out.dtype.element_ty),
                        mask=mask,
                    )

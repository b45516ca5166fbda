"""What belongs to one modality of several, and where its part of a buffer begins."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pick(values, m):
    """values[m] of a tuple, for an m known at run time only."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        if m == i:
            chosen = values[i]
    return chosen


@triton.jit
def pick_stride(strides, m):
    """strides[m] in 64 bits, whatever the others have."""
    chosen = tl.cast(strides[0], tl.int64)
    for i in tl.static_range(1, len(strides)):
        if m == i:
            chosen = tl.cast(strides[i], tl.int64)
    return chosen


@triton.jit
def even(odd):
    """n of 2 n + 1, as the host passes what changes from call to call inside of a tuple.

    An odd number is never specialised on: neither 1 (n > 0) nor a multiple of 16.
    """
    return odd >> 1


@triton.jit
def locate(program, counts):
    """(modality, index in it) of a program where modality i has even(counts[i]) programs."""
    m = program * 0
    for i in tl.static_range(len(counts) - 1):
        if (m == i) & (program >= even(counts[i])):
            program -= even(counts[i])
            m += 1
    return m, program


@triton.jit
def start_of(m, sizes):
    """The sum of the sizes of the modalities before m."""
    start = tl.cast(m, tl.int64) * 0
    for i in tl.static_range(len(sizes) - 1):
        if i < m:
            start += sizes[i]
    return start


@triton.jit
def products_start(m, widths, B, rank_out):
    """Where P of modality m begins: its parts are [B, R T_o, r_m]."""
    return start_of(m, widths) * B * rank_out


@triton.jit
def z_start(m, tokens, widths, B):
    """Where z of modality m begins: its parts are [B, T_m, r_m]."""
    start = tl.cast(m, tl.int64) * 0
    for i in tl.static_range(len(widths) - 1):
        if i < m:
            start += tl.cast(even(tokens[i]), tl.int64) * widths[i]
    return start * B


@triton.jit
def counted(lengths, m, b, B, T):
    """How many of an item's T tokens count."""
    if lengths is None:
        count = T
    else:
        length = tl.load(lengths + tl.cast(m, tl.int64) * B + b)
        count = tl.minimum(tl.maximum(length, 0), T).to(tl.int32)
    return count


@triton.jit
def time_factor(
    factor, t, in_t, columns, ranks, T, To, rank_out, SUMMED: tl.constexpr, DTYPE: tl.constexpr
):
    """A [tokens t, columns q T_o + o] rounded to DTYPE, or with SUMMED the sum over its ranks."""
    offsets = tl.cast(columns // To, tl.int64) * T * To + columns % To
    places = factor + t[:, None].to(tl.int64) * To + offsets[None, :]
    mask = in_t[:, None] & (columns < rank_out)[None, :]
    tile = tl.load(places, mask=mask, other=0.0)
    if SUMMED:
        tile = tile.to(tl.float32)
        for q in range(1, ranks):
            tile += tl.load(places + tl.cast(q, tl.int64) * T * To, mask=mask, other=0.0).to(
                tl.float32
            )
    return tile.to(DTYPE)


@triton.jit
def feature_factor(factor, q, units, cols, ranks, r, D, SUMMED: tl.constexpr, DTYPE: tl.constexpr):
    """U_q [units, cols] rounded to DTYPE, or with SUMMED the sum over its ranks."""
    places = factor + tl.cast(q, tl.int64) * r * D + units[:, None].to(tl.int64) * D + cols[None, :]
    mask = (units < r)[:, None] & (cols < D)[None, :]
    tile = tl.load(places, mask=mask, other=0.0)
    if SUMMED:
        tile = tile.to(tl.float32)
        for i in range(1, ranks):
            tile += tl.load(places + tl.cast(i, tl.int64) * r * D, mask=mask, other=0.0).to(
                tl.float32
            )
    return tile.to(DTYPE)


@triton.jit
def sum_slabs(slabs, stride, count, offsets, mask):
    """The sum in order of `count` partial sums, `stride` apart."""
    total = tl.load(slabs + offsets, mask=mask, other=0.0)
    for i in range(1, count):
        total += tl.load(slabs + tl.cast(i, tl.int64) * stride + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def factor_product(
    partials,
    stride,
    count,
    kept,
    keep,
    places,
    in_rows,
    factor,
    q,
    cols,
    ranks,
    r,
    D,
    SUMMED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """P_q U_q [rows, cols], of rows of P at `places` in partial sums; their sum goes to `kept`."""
    product = tl.zeros([places.shape[0], cols.shape[0]], tl.float32)
    for first in range(0, R, BLOCK_R):
        units = first + tl.arange(0, BLOCK_R)
        offsets = places[:, None] + units[None, :]
        inside = (units < r)[None, :]
        p = sum_slabs(partials, stride, count, offsets, in_rows[:, None] & inside)
        if kept is not None:
            tl.store(kept + offsets, p, mask=keep[:, None] & inside)
        u = feature_factor(factor, q, units, cols, ranks, r, D, SUMMED, DTYPE)
        product = tl.dot(p.to(DTYPE), u, product, input_precision=PRECISION)
    return product

"""The gradients of the parameters: partial sums over ranges of rows, then their reduction."""

from __future__ import annotations

import triton
import triton.language as tl

from ..products import transposed_product
from ..rows import load_vector, sum_of_products
from .groups import load_run


@triton.jit(do_not_specialize=["M", "n1", "n2", "rows_per_split", "input_threshold"])
def weights_kernel(
    dy,
    x,
    dz,
    h,
    stats,
    order,
    table,
    input_seed,
    input_threshold: tl.uint32,
    down_product,
    kept_product,
    down_sum,
    up_product,
    up_sum,
    M,
    D,
    D_out,
    n1,
    n2,
    dy_stride0,
    dy_stride1,
    dy_stride2,
    x_stride0,
    x_stride1,
    x_stride2,
    rows_per_split,
    ROW_DIMS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums over one range of rows, each where its pointer [splits, ...] is not None.

    A range may be one of a table's, of rows of one adapter, which follow one another in dz, h and
    stats.

    One half of the programs forms x^T dz [D, R], of a normalised x where there are stats, and the
    sum of dz [R]; the other half dy^T h [D_out, R] and the sum of dy [D_out]. With an input_seed of
    what dropout keeps of x, before it is divided; then the first half forms of the ones that are
    kept their product with dz [D, R], too.
    """
    width = D if D_out is None else D_out
    first = tl.program_id(0) * BLOCK_D
    cols = first + tl.arange(0, BLOCK_D)
    inside = cols < D
    units = tl.program_id(1) // 2 * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2).to(tl.int64)
    begin = tl.program_id(2).to(M.dtype) * rows_per_split
    end = tl.minimum(begin + rows_per_split, M)
    if table is not None:
        _, begin, end = load_run(table, tl.program_id(2), M)
        if begin == end:
            return
    place = (split * D + cols)[:, None] * R + units[None, :]
    if tl.program_id(1) % 2 == 0:
        if D_out is not None:  # these columns may be none of D
            end = tl.where(first < D, end, begin)
        if down_product is not None:
            product, total, of_kept = transposed_product(
                x, dz, stats, order, input_seed, input_threshold, begin, end, first, D, units, n1,
                n2, x_stride0, x_stride1, x_stride2, False, kept_product is not None, ROW_DIMS,
                DTYPE, PRECISION, R, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            tl.store(down_product + place, product, mask=inside[:, None])
            if kept_product is not None:
                tl.store(kept_product + place, of_kept, mask=inside[:, None])
        if down_sum is not None and tl.program_id(0) == 0:
            dz_total = tl.zeros([BLOCK_R], tl.float32)
            for start in range(begin, end, BLOCK_M):
                places = start + tl.arange(0, BLOCK_M)
                tile = places.to(tl.int64)[:, None] * R + units[None, :]
                b = tl.load(dz + tile, mask=(places < end)[:, None], other=0.0)
                dz_total += tl.sum(b.to(tl.float32), 0)
            tl.store(down_sum + split * R + units, dz_total)
    elif up_product is not None or up_sum is not None:
        if D_out is not None:
            end = tl.where(first < D_out, end, begin)
            place = (split * D_out + cols)[:, None] * R + units[None, :]
            inside = cols < D_out
        product, total, of_kept = transposed_product(
            dy, h, None, order, None, None, begin, end, first, width, units, n1, n2,
            dy_stride0, dy_stride1, dy_stride2, up_sum is not None, False, ROW_DIMS, DTYPE,
            PRECISION, R, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        if up_product is not None:
            tl.store(up_product + place, product, mask=inside[:, None])
        if up_sum is not None and tl.program_id(1) == 1:
            tl.store(up_sum + split * width + cols, total, mask=inside)


@triton.jit
def sum_of_splits(partials, first, last, size, place, inside):
    """The sum of partials first ... last - 1 of [splits, size] in order, at [BLOCK_D, BLOCK_R]."""
    total = tl.zeros(place.shape, tl.float32)
    for i in range(first, last):
        partial = partials + tl.cast(i, tl.int64) * size
        total += tl.load(partial + place, mask=inside[:, None], other=0.0)
    return total


@triton.jit(do_not_specialize=["splits"])
def reduce_kernel(
    down_product,
    kept_product,
    down_sum,
    up_product,
    up_sum,
    down_weight,
    up_weight,
    up_bias,
    norm_weight,
    norm_bias,
    scale,
    d_down_weight,
    d_down_bias,
    d_up_weight,
    d_up_bias,
    d_norm_weight,
    d_norm_bias,
    d_scale,
    scale_value,
    input_keep,
    firsts,
    splits,
    D,
    D_out,
    r,
    DTYPE: tl.constexpr,
    X_DTYPE: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the splits in order, and form the gradients.

    Of stacks those of one adapter, whose splits are in firsts; zeros where it has none.

    With P = norm(x)^T dz before gain and offset, S = sum dz, G = dy^T h and T = sum dy:
    dWd = (gamma P + beta S)^T, d gamma = sum_r Wd^T P, d beta = Wd^T S, dbd = S,
    dWu = s G, ds = sum_r Wu G + bu T, dbu = s T. Dropout in front of Wd puts K^T dz in the place of
    S but for dbd, K being what it keeps of ones; P and K are yet to be multiplied by 1 / (1 - p).
    """
    width = D if D_out is None else D_out
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    inside_out = cols < width
    split = 0
    behind = splits
    known, known_out = inside, inside_out
    if firsts is not None:
        own = tl.program_id(1).to(tl.int64)
        split = tl.load(firsts + own)
        behind = tl.load(firsts + own + 1)
        known = cols < tl.where(split < behind, D, 0)
        known_out = cols < tl.where(split < behind, width, 0)
        down_weight += own * (r * D)
        up_weight += own * (r * width)
        up_bias = None if up_bias is None else up_bias + own * width
        norm_weight = None if norm_weight is None else norm_weight + own * D
        norm_bias = None if norm_bias is None else norm_bias + own * D
        d_down_weight = None if d_down_weight is None else d_down_weight + own * (r * D)
        d_down_bias = None if d_down_bias is None else d_down_bias + own * r
        d_up_weight = None if d_up_weight is None else d_up_weight + own * (r * width)
        d_up_bias = None if d_up_bias is None else d_up_bias + own * width
        d_norm_weight = None if d_norm_weight is None else d_norm_weight + own * D
        d_norm_bias = None if d_norm_bias is None else d_norm_bias + own * D
        scale = None if scale is None else scale + own * (width if CHANNEL_SCALE else 1)
        d_scale = None if d_scale is None else d_scale + own * width
    gain = tl.full([BLOCK_D], 1.0, tl.float32)
    if norm_weight is not None:
        gain = load_vector(norm_weight, cols, known, X_DTYPE)
    s = tl.full([BLOCK_D], 1.0, tl.float32) * scale_value
    if scale is not None:
        s = load_vector(scale, cols if CHANNEL_SCALE else cols * 0, known_out, DTYPE)
    gain_gradient = tl.zeros([BLOCK_D], tl.float32)
    offset_gradient = tl.zeros([BLOCK_D], tl.float32)
    scale_gradient = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, R, BLOCK_R):
        units = first + tl.arange(0, BLOCK_R)
        whole = inside[:, None] & (units < r)[None, :]
        whole_out = inside_out[:, None] & (units < r)[None, :]
        place = cols[:, None] * R + units[None, :]
        transposed = units[None, :] * D + cols[:, None]
        straight = cols[:, None] * r + units[None, :]
        if down_sum is not None:
            dz_total = tl.zeros([BLOCK_R], tl.float32)
            for i in range(split, behind):
                dz_total += tl.load(down_sum + i * R + units)
            if d_down_bias is not None and tl.program_id(0) == 0:
                tl.store(d_down_bias + units, dz_total, mask=units < r)
        of_ones = None
        if kept_product is not None:
            of_ones = input_keep * sum_of_splits(kept_product, split, behind, D * R, place, inside)
        elif down_sum is not None:
            of_ones = dz_total[None, :]
        if d_norm_weight is not None or d_norm_bias is not None:
            w = tl.load(down_weight + transposed, mask=known[:, None] & whole, other=0.0)
            w = w.to(DTYPE).to(tl.float32)
        if d_norm_bias is not None:
            offset_gradient += sum_of_products(w, of_ones, 1)
        if down_product is not None:
            product = sum_of_splits(down_product, split, behind, D * R, place, inside)
            if input_keep is not None:
                product *= input_keep
            if d_norm_weight is not None:
                gain_gradient += sum_of_products(w, product, 1)
            if d_down_weight is not None:
                out = product * gain[:, None]
                if norm_bias is not None:
                    offset = load_vector(norm_bias, cols, known, X_DTYPE)
                    out += offset[:, None] * of_ones
                tl.store(d_down_weight + transposed, out, mask=whole)
        if up_product is not None:
            product = sum_of_splits(up_product, split, behind, width * R, place, inside_out)
            if d_up_weight is not None:
                tl.store(d_up_weight + straight, product * s[:, None], mask=whole_out)
            if d_scale is not None:
                w = tl.load(up_weight + straight, mask=known_out[:, None] & whole_out, other=0.0)
                scale_gradient += sum_of_products(w.to(DTYPE).to(tl.float32), product, 1)
    if d_norm_weight is not None:
        tl.store(d_norm_weight + cols, gain_gradient, mask=inside)
    if d_norm_bias is not None:
        tl.store(d_norm_bias + cols, offset_gradient, mask=inside)
    if up_sum is not None:
        dy_total = tl.zeros([BLOCK_D], tl.float32)
        for i in range(split, behind):
            partial = up_sum + tl.cast(i, tl.int64) * width
            dy_total += tl.load(partial + cols, mask=inside_out, other=0.0)
        if d_up_bias is not None:
            tl.store(d_up_bias + cols, dy_total * s, mask=inside_out)
        if up_bias is not None:
            scale_gradient += load_vector(up_bias, cols, known_out, DTYPE) * dy_total
    if d_scale is not None:
        tl.store(d_scale + cols, scale_gradient, mask=inside_out)

"""Products of tiles, accumulated in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import survivors
from .rows import load_stats, load_vector, row_offsets, rows_at


@triton.jit
def in_step(tile, inside):
    """A loaded tile, selected where it is ``inside`` (as it was loaded), to pass registers.

    Else on Hopper Triton lets a product whose other factor comes from registers still run when the
    next iteration overwrites these registers.
    """
    return tl.where(inside, tile, 0.0).to(tile.dtype)


@triton.jit
def contract(
    x,
    offsets,
    in_rows,
    mean,
    rstd,
    norm_weight,
    weight,
    weight_stride_r,
    weight_stride_d,
    gain,
    units,
    D,
    r,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    norm_bias=None,
    seed=None,
    rows=None,
    threshold=None,
):
    """x (W gain)^T [BLOCK_M, BLOCK_R] over the rows of x, with a mean of x normalised.

    With a seed of what dropout keeps, not yet multiplied by 1 / (1 - p). Both factors are rounded
    to DTYPE. The gain goes to W, not to x, so that an x of DTYPE passes from its asynchronous
    copies straight to the tensor cores. LayerNorm takes the mean off first: a row that is nearly
    constant has nothing left of it in the product to cancel.
    """
    product = tl.zeros([in_rows.shape[0], units.shape[0]], tl.float32)
    for k in range(0, D, BLOCK_D):
        cols = k + tl.arange(0, BLOCK_D)
        inside = cols < D
        whole = in_rows[:, None] & inside[None, :]
        a = tl.load(x + offsets[:, None] + cols[None, :], mask=whole, other=0.0)
        if mean is not None:
            g = load_vector(norm_weight, cols, inside, x.dtype.element_ty)
            a = (a.to(tl.float32) - mean[:, None]) * rstd[:, None] * g[None, :]
            if norm_bias is not None:
                a += load_vector(norm_bias, cols, inside, x.dtype.element_ty)[None, :]
        if seed is not None:
            kept = survivors(seed, rows, k, D, threshold, 1, BLOCK_D)
            a = tl.where(kept, a, 0.0).to(a.dtype)
        w = tl.load(
            weight + units[:, None] * weight_stride_r + cols[None, :] * weight_stride_d,
            mask=(units[:, None] < r) & inside[None, :],
            other=0.0,
        ).to(DTYPE)
        if gain is not None:
            g = load_vector(gain, cols, inside, DTYPE)
            w = (w.to(tl.float32) * g[None, :]).to(DTYPE)
        straight: tl.constexpr = mean is None and seed is None
        if not straight or not (x.dtype.element_ty == DTYPE):  # noqa: SIM201
            w = in_step(w, (units < r)[:, None])
        product = tl.dot(a.to(DTYPE), tl.trans(w), product, input_precision=PRECISION)
    return product


@triton.jit
def expand(
    tile,
    stored,
    places,
    in_rows,
    weight,
    weight_stride_r,
    weight_stride_d,
    cols,
    inside,
    r,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """tile W [BLOCK_M, BLOCK_D]; a tile of several blocks of R is read from stored [M, R]."""
    product = tl.zeros([in_rows.shape[0], cols.shape[0]], tl.float32)
    for first in range(0, R, BLOCK_R):
        units = first + tl.arange(0, BLOCK_R)
        w = tl.load(
            weight + units[:, None] * weight_stride_r + cols[None, :] * weight_stride_d,
            mask=(units[:, None] < r) & inside[None, :],
            other=0.0,
        ).to(tile.dtype)
        part = tile
        if R > BLOCK_R:
            part = tl.load(
                stored + places.to(tl.int64)[:, None] * R + units[None, :],
                mask=in_rows[:, None],
                other=0.0,
            )
        product = tl.dot(part, w, product, input_precision=PRECISION)
    return product


@triton.jit
def transposed_product(
    a,
    b,
    stats,
    order,
    seed,
    threshold,
    begin,
    end,
    first,
    D,
    units,
    n1,
    n2,
    stride0,
    stride1,
    stride2,
    SUM: tl.constexpr,
    KEPT: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """a^T b [BLOCK_D, BLOCK_R], columns ``first`` ... of a, over places begin to end - 1; more.

    Rows of b and stats are at the places, those of a at the rows that the order has there. a is
    rounded to DTYPE, with stats after it was normalised (without gain and offset), with a seed
    after dropout (not yet multiplied by 1 / (1 - p)). With SUM also the sums of a [BLOCK_D], with
    KEPT ones in the place of a [BLOCK_D, BLOCK_R]. The sum of a 16-bit a is a product with ones: to
    take a from its buffer a second time, into registers, would race with the asynchronous products
    on Hopper (Triton 3.7 keeps one buffer too few).
    """
    cols = first + tl.arange(0, BLOCK_D)
    wide: tl.constexpr = a.dtype.element_ty == tl.float32
    product = tl.zeros([BLOCK_D, units.shape[0]], tl.float32)
    of_kept = tl.zeros([BLOCK_D, units.shape[0]], tl.float32)
    ones = tl.full([BLOCK_M, 16], 1.0, DTYPE)
    products = tl.zeros([BLOCK_D, 16], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_M):
        places = start + tl.arange(0, BLOCK_M)
        in_rows = places < end
        rows = rows_at(order, places, in_rows)
        offsets = row_offsets(rows, n1, n2, stride0, stride1, stride2, ROW_DIMS)
        a_tile = tl.load(
            a + offsets[:, None] + cols[None, :],
            mask=in_rows[:, None] & (cols < D)[None, :],
            other=0.0,
        )
        if SUM and wide:
            sums += a_tile
        if stats is not None:
            mean, rstd = load_stats(stats, places, in_rows)
            a_tile = (a_tile.to(tl.float32) - mean[:, None]) * rstd[:, None]
        a_tile = a_tile.to(DTYPE)
        if seed is not None:
            kept = survivors(seed, rows, first, D, threshold, 1, BLOCK_D)
            a_tile = tl.where(kept, a_tile, 0.0).to(DTYPE)
        if b is not None:
            b_tile = tl.load(
                b + places.to(tl.int64)[:, None] * R + units[None, :],
                mask=in_rows[:, None],
                other=0.0,
            )
            straight: tl.constexpr = stats is None and seed is None
            if not straight or not (a.dtype.element_ty == DTYPE):  # noqa: SIM201
                b_tile = in_step(b_tile, in_rows[:, None])
            product = tl.dot(tl.trans(a_tile), b_tile, product, input_precision=PRECISION)
            if KEPT:
                kept_ones = tl.trans(kept.to(DTYPE))
                of_kept = tl.dot(kept_ones, b_tile, of_kept, input_precision=PRECISION)
        if SUM and not wide:
            products = tl.dot(tl.trans(a_tile), ones, products, input_precision=PRECISION)
    return product, tl.sum(sums, 0) if wide else tl.sum(products, 1) / 16, of_kept


@triton.jit
def plus(total, product):
    """total + product, rounded apart.

    Written as a sum, a product of tiles would be accumulated on top of the total: thousands of
    terms in one chain, which lose digits.
    """
    return tl.fma(product, tl.full(total.shape, 1.0, tl.float32), total)


@triton.jit
def multiply(
    total,
    a,
    a_offsets,
    a_inside,
    a_step,
    b,
    b_offsets,
    b_inside,
    b_step,
    K,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """total + a b over K in fp32: a[m, k] is at a_offsets[m] + k a_step, b[k, n] alike.

    Each BLOCK_K is summed apart.
    """
    for k in range(0, K, BLOCK_K):
        steps = k + tl.arange(0, BLOCK_K)
        inside = steps < K
        steps = steps.to(tl.int64)
        x = tl.load(
            a + a_offsets[:, None] + (steps * a_step)[None, :],
            mask=a_inside[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        y = tl.load(
            b + (steps * b_step)[:, None] + b_offsets[None, :],
            mask=inside[:, None] & b_inside[None, :],
            other=0.0,
        ).to(tl.float32)
        if PRECISION == "tf32":
            x = in_step(x, a_inside[:, None])
            y = in_step(y, b_inside[None, :])
        total = plus(total, tl.dot(x, y, input_precision=PRECISION))
    return total

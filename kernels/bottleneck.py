"""The adapter bottleneck in Triton, for NVIDIA and AMD: forward, and backward without atomics.

Forward: a program owns BLOCK_M rows. x streams by in blocks of D and is contracted to z
[BLOCK_M, r], which stays in registers through activation and dropout; then y streams out, and x is
read again, from L2, where it is the residual. Backward: one pass recomputes z, contracts dy to dh
and writes dx and the small dz and h [M, r]; a second contracts x and dy with these, each program
over a range of rows; the last adds the ranges in order and forms every parameter's gradient.

The row m of a tensor [n0, n1, n2, D] lies at any three strides. R is r rounded up to a multiple of
BLOCK_R; where there are several blocks of R, h and dz pass through memory. Products accumulate in
fp32, and vectors are widened to fp32 as they are loaded.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadapters.ops.bottleneck import PARAMETERS, allocate_gradients, allocate_saved
from fastadapters.reference.philox import dropout_threshold

# The kernels' activation codes are positions in fastadapters.ops.bottleneck.ACTIVATION_NAMES.
IDENTITY = tl.constexpr(0)
RELU = tl.constexpr(1)
GELU = tl.constexpr(2)
GELU_TANH = tl.constexpr(3)
SILU = tl.constexpr(4)
QUICK_GELU = tl.constexpr(5)


@triton.jit
def _gate(z, ACTIVATION: tl.constexpr):
    """g and g' of the activations of the form z * sigmoid(g(z)); 1 + tanh(u) is 2 sigmoid(2 u)."""
    if ACTIVATION == SILU:
        return z, 1.0
    elif ACTIVATION == QUICK_GELU:
        return 1.702 * z, 1.702
    else:
        tl.static_assert(ACTIVATION == GELU_TANH)
        square = z * z
        return z * (1.5957691216057308 + 0.07135481627260025 * square), (
            1.5957691216057308 + 0.21406444881780076 * square
        )


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == IDENTITY:
        return z
    elif ACTIVATION == RELU:
        return tl.maximum(z, 0.0)
    elif ACTIVATION == GELU:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        g, _ = _gate(z, ACTIVATION)
        return z * tl.sigmoid(g)


@triton.jit
def _activation_gradient(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == IDENTITY:
        return tl.full(z.shape, 1.0, tl.float32)
    elif ACTIVATION == RELU:
        return tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    else:
        g, slope = _gate(z, ACTIVATION)
        s = tl.sigmoid(g)
        return s + z * slope * s * (1.0 - s)


@triton.jit
def _row_offsets(rows, n1, n2, stride0, stride1, stride2, ROW_DIMS: tl.constexpr):
    """Where rows of a tensor [n0, n1, n2, D] begin; of n0, n1, n2 the last ROW_DIMS are there."""
    if ROW_DIMS == 1:
        return rows.to(tl.int64) * stride2
    outer = rows // n2
    offsets = (rows % n2).to(tl.int64) * stride2
    if ROW_DIMS == 2:
        return offsets + outer.to(tl.int64) * stride1
    return offsets + (outer % n1).to(tl.int64) * stride1 + (outer // n1).to(tl.int64) * stride0


@triton.jit
def _load_vector(pointer, index, inside, dtype: tl.constexpr):
    """A parameter's elements rounded to the compute dtype, in fp32."""
    return tl.load(pointer + index, mask=inside, other=0.0).to(dtype).to(tl.float32)


@triton.jit
def _load_stats(stats, rows, in_rows):
    """The mean and the reciprocal standard deviation of rows, from stats [M, 2]."""
    pair = stats + rows.to(tl.int64) * 2
    return tl.load(pair, mask=in_rows, other=0.0), tl.load(pair + 1, mask=in_rows, other=0.0)


@triton.jit
def _sum_of_products(a, b, axis: tl.constexpr):
    """tl.sum(a * b, axis), rounded alike in all the threads that hold the result.

    Left to itself the compiler fuses a thread's product into its sum with a neighbour's, and the
    neighbour the other way round. A fused product is not fused again.
    """
    return tl.sum(tl.fma(a, tl.broadcast_to(b, a.shape), tl.zeros_like(a)), axis)


@triton.jit
def _survivors(seed, rows, first, r, threshold, BLOCK_R: tl.constexpr):
    """Whether dropout keeps h[rows, first : first + BLOCK_R]; four columns share a Philox call."""
    group = first // 4 + tl.arange(0, BLOCK_R // 4)
    e = rows.to(tl.uint64)[:, None] * ((r + 3) // 4) + group.to(tl.uint64)[None, :]
    offset = tl.load(seed + 1).to(tl.uint64)
    w0, w1, w2, w3 = tl.philox(
        tl.load(seed),
        e.to(tl.uint32),
        (e >> 32).to(tl.uint32),
        offset.to(tl.uint32),
        (offset >> 32).to(tl.uint32),
    )
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)) >= threshold


@triton.jit
def _moments(x, row_offsets, in_rows, D, BLOCK_D: tl.constexpr):
    """Mean and variance of rows, from sums about the mean of their first block: no cancellation."""
    shift = tl.zeros([in_rows.shape[0]], tl.float32)
    total = tl.zeros([in_rows.shape[0], BLOCK_D], tl.float32)
    squares = tl.zeros([in_rows.shape[0], BLOCK_D], tl.float32)
    for k in tl.range(0, D, BLOCK_D, num_stages=3):
        cols = k + tl.arange(0, BLOCK_D)
        inside = cols < D
        whole = in_rows[:, None] & inside[None, :]
        a = tl.load(x + row_offsets[:, None] + cols[None, :], mask=whole, other=0.0)
        a = a.to(tl.float32)
        if k == 0:
            shift = tl.sum(a, 1) / tl.minimum(D, BLOCK_D)
        a = tl.where(inside[None, :], a - shift[:, None], 0.0)
        total += a
        squares += a * a
    mean = tl.sum(total, 1) / D
    return shift + mean, tl.sum(squares, 1) / D - mean * mean


@triton.jit
def _contract(
    x,
    row_offsets,
    in_rows,
    shift,
    weight,
    weight_stride_r,
    weight_stride_d,
    gain,
    units,
    D,
    r,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(x - shift) (W gain)^T [BLOCK_M, BLOCK_R] over the rows of x; shift and gain may be None.

    The gain goes to W, not to x, so that x passes from its asynchronous copies straight to the
    tensor cores.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    product = tl.zeros([in_rows.shape[0], units.shape[0]], tl.float32)
    for k in range(0, D, BLOCK_D):
        cols = k + tl.arange(0, BLOCK_D)
        inside = cols < D
        whole = in_rows[:, None] & inside[None, :]
        a = tl.load(x + row_offsets[:, None] + cols[None, :], mask=whole, other=0.0)
        if shift is not None:
            a -= shift[:, None]
        w = tl.load(
            weight + units[:, None] * weight_stride_r + cols[None, :] * weight_stride_d,
            mask=(units[:, None] < r) & inside[None, :],
            other=0.0,
        ).to(dtype)
        if gain is not None:
            g = _load_vector(gain, cols, inside, dtype)
            w = (w.to(tl.float32) * g[None, :]).to(dtype)
        product = tl.dot(a, tl.trans(w), product, input_precision=PRECISION)
    return product


@triton.jit
def _pre_activation(
    x,
    x_rows,
    in_rows,
    mean,
    rstd,
    down_weight,
    down_bias,
    norm_weight,
    norm_products,
    units,
    D,
    r,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z [BLOCK_M, BLOCK_R], and z without its offsets.

    norm(x) Wd^T = rstd (x - mean) (Wd gamma)^T + Wd beta. The product with the mean is taken off
    afterwards, with the very weights that x met: fp32 has room for that beside a 16-bit x. Beside
    an fp32 x it has not, so there the mean comes off first.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32
    shift = mean if EXACT else None
    z = _contract(
        x, x_rows, in_rows, shift, down_weight, D, 1, norm_weight, units, D, r, PRECISION, BLOCK_D
    )
    centred = z
    if norm_weight is not None:
        if not EXACT:
            centred -= mean[:, None] * tl.load(norm_products + units)[None, :]
        centred *= rstd[:, None]
        z = centred + tl.load(norm_products + 2 * R + units)[None, :]
    if down_bias is not None:
        z += _load_vector(down_bias, units, units < r, dtype)[None, :]
    return z, centred


@triton.jit
def _expand(
    tile,
    stored,
    rows,
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
                stored + rows.to(tl.int64)[:, None] * R + units[None, :],
                mask=in_rows[:, None],
                other=0.0,
            )
        product = tl.dot(part, w, product, input_precision=PRECISION)
    return product


@triton.jit
def _norm_kernel(
    norm_products,
    down_weight,
    norm_weight,
    norm_bias,
    D,
    r,
    DTYPE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums over D of Wd gamma rounded as `_contract` does, of Wd gamma, and of Wd beta: [3, R]."""
    units = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    rounded = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    exact = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    offset = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for k in range(0, D, BLOCK_D):
        cols = k + tl.arange(0, BLOCK_D)
        inside = cols < D
        w = tl.load(
            down_weight + units[:, None] * D + cols[None, :],
            mask=(units[:, None] < r) & inside[None, :],
            other=0.0,
        )
        w = w.to(DTYPE).to(tl.float32)
        gained = w * _load_vector(norm_weight, cols, inside, DTYPE)[None, :]
        rounded += gained.to(DTYPE).to(tl.float32)
        exact += gained
        if norm_bias is not None:
            offset += w * _load_vector(norm_bias, cols, inside, DTYPE)[None, :]
    tl.store(norm_products + units, tl.sum(rounded, 1))
    tl.store(norm_products + R + units, tl.sum(exact, 1))
    tl.store(norm_products + 2 * R + units, tl.sum(offset, 1))


@triton.jit(do_not_specialize=["M", "n1", "n2", "threshold"])
def _forward_kernel(
    x,
    residual,
    y,
    stats,
    hidden,
    down_weight,
    down_bias,
    up_weight,
    up_bias,
    norm_weight,
    norm_products,
    scale,
    seed,
    scale_value,
    norm_eps,
    keep_scale,
    threshold: tl.uint32,
    M,
    D,
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
    ROW_DIMS: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    rows = tl.program_id(0).to(M.dtype) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < M
    x_rows = _row_offsets(rows, n1, n2, x_stride0, x_stride1, x_stride2, ROW_DIMS)
    mean = None
    rstd = None
    if norm_weight is not None:
        mean, variance = _moments(x, x_rows, in_rows, D, BLOCK_D)
        rstd = tl.rsqrt(variance + norm_eps)
        if stats is not None:
            pair = stats + rows.to(tl.int64) * 2
            tl.store(pair, mean, mask=in_rows)
            tl.store(pair + 1, rstd, mask=in_rows)

    h = tl.zeros([BLOCK_M, BLOCK_R], dtype)
    for first in range(0, R, BLOCK_R):
        units = first + tl.arange(0, BLOCK_R)
        z, _ = _pre_activation(
            x, x_rows, in_rows, mean, rstd, down_weight, down_bias, norm_weight, norm_products,
            units, D, r, R, PRECISION, BLOCK_D,
        )  # fmt: skip
        active = _activate(z, ACTIVATION)
        if seed is not None:
            keep = _survivors(seed, rows, first, r, threshold, BLOCK_R)
            active = tl.where(keep, active * keep_scale, 0.0)
        h = active.to(dtype)
        if R > BLOCK_R:
            tl.store(
                hidden + rows.to(tl.int64)[:, None] * R + units[None, :], h, mask=in_rows[:, None]
            )
    if R > BLOCK_R:
        tl.debug_barrier()

    s = scale_value
    if scale is not None and not CHANNEL_SCALE:
        s = tl.load(scale).to(dtype).to(tl.float32)
    y_rows = _row_offsets(rows, n1, n2, y_stride0, y_stride1, y_stride2, ROW_DIMS)
    if residual is not None:
        residual_rows = _row_offsets(
            rows, n1, n2, residual_stride0, residual_stride1, residual_stride2, ROW_DIMS
        )
    for k in range(0, D, BLOCK_D):
        cols = k + tl.arange(0, BLOCK_D)
        inside = cols < D
        whole = in_rows[:, None] & inside[None, :]
        if residual is not None:
            kept = tl.load(residual + residual_rows[:, None] + cols[None, :], mask=whole, other=0.0)
        out = _expand(
            h, hidden, rows, in_rows, up_weight, 1, r, cols, inside, r, R, PRECISION, BLOCK_R
        )
        if up_bias is not None:
            out += _load_vector(up_bias, cols, inside, dtype)[None, :]
        if CHANNEL_SCALE:
            out *= _load_vector(scale, cols, inside, dtype)[None, :]
        else:
            out *= s
        if residual is not None:
            out += kept.to(tl.float32)
        tl.store(y + y_rows[:, None] + cols[None, :], out.to(dtype), mask=whole)


@triton.jit(do_not_specialize=["M", "n1", "n2", "threshold"])
def _backward_kernel(
    dy,
    x,
    dx,
    dz_out,
    h_out,
    stats,
    down_weight,
    down_bias,
    up_weight,
    norm_weight,
    norm_products,
    scale,
    seed,
    scale_value,
    keep_scale,
    threshold: tl.uint32,
    M,
    D,
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
    ADD_X: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx, and dz and h [M, R] for the weights' gradients; each where its pointer is not None."""
    dtype: tl.constexpr = x.dtype.element_ty
    rows = tl.program_id(0).to(M.dtype) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < M
    x_rows = _row_offsets(rows, n1, n2, x_stride0, x_stride1, x_stride2, ROW_DIMS)
    dy_rows = _row_offsets(rows, n1, n2, dy_stride0, dy_stride1, dy_stride2, ROW_DIMS)
    mean = None
    rstd = None
    if norm_weight is not None:
        mean, rstd = _load_stats(stats, rows, in_rows)
        along_ones = tl.zeros([BLOCK_M], tl.float32)
        along_x = tl.zeros([BLOCK_M], tl.float32)

    dz = tl.zeros([BLOCK_M, BLOCK_R], dtype)
    for first in range(0, R, BLOCK_R):
        units = first + tl.arange(0, BLOCK_R)
        tile = rows.to(tl.int64)[:, None] * R + units[None, :]
        if dx is not None or dz_out is not None:
            gain = scale if CHANNEL_SCALE else None
            dh = _contract(
                dy, dy_rows, in_rows, None, up_weight, 1, r, gain, units, D, r, PRECISION, BLOCK_D
            )
            if scale is None:
                dh *= scale_value
            elif not CHANNEL_SCALE:
                dh *= tl.load(scale).to(dtype).to(tl.float32)
        z, centred = _pre_activation(
            x, x_rows, in_rows, mean, rstd, down_weight, down_bias, norm_weight, norm_products,
            units, D, r, R, PRECISION, BLOCK_D,
        )  # fmt: skip
        keep = 1.0
        if seed is not None:
            keep = tl.where(_survivors(seed, rows, first, r, threshold, BLOCK_R), keep_scale, 0.0)
        if h_out is not None:
            h = _activate(z, ACTIVATION) * keep
            tl.store(h_out + tile, h.to(dtype), mask=in_rows[:, None])
        if dx is not None or dz_out is not None:
            dz = (dh * _activation_gradient(z, ACTIVATION) * keep).to(dtype)
            if dz_out is not None:
                tl.store(dz_out + tile, dz, mask=in_rows[:, None])
            if norm_weight is not None:
                # With g = dz Wd the gradient of norm(x), LayerNorm's backward needs the sums over D
                # of g gamma and of g gamma (x - mean) rstd: they are dz . (Wd gamma) and dz . z
                # without its offsets, which spares a pass over D.
                wide = dz.to(tl.float32)
                gain = tl.load(norm_products + R + units)
                along_ones += _sum_of_products(wide, gain[None, :], 1)
                along_x += _sum_of_products(wide, centred, 1)

    if dx is not None:
        if R > BLOCK_R:
            tl.debug_barrier()
        dx_rows = _row_offsets(rows, n1, n2, dx_stride0, dx_stride1, dx_stride2, ROW_DIMS)
        for k in range(0, D, BLOCK_D):
            cols = k + tl.arange(0, BLOCK_D)
            inside = cols < D
            whole = in_rows[:, None] & inside[None, :]
            if ADD_X:
                kept = tl.load(dy + dy_rows[:, None] + cols[None, :], mask=whole, other=0.0)
            if norm_weight is not None:
                a = tl.load(x + x_rows[:, None] + cols[None, :], mask=whole, other=0.0)
            out = _expand(
                dz, dz_out, rows, in_rows, down_weight, D, 1, cols, inside, r, R, PRECISION, BLOCK_R
            )
            if norm_weight is not None:
                normed = (a.to(tl.float32) - mean[:, None]) * rstd[:, None]
                out *= _load_vector(norm_weight, cols, inside, dtype)[None, :]
                out -= (along_ones[:, None] + normed * along_x[:, None]) / D
                out *= rstd[:, None]
            if ADD_X:
                out += kept.to(tl.float32)
            tl.store(dx + dx_rows[:, None] + cols[None, :], out.to(dtype), mask=whole)


@triton.jit
def _transposed_product(
    a,
    b,
    stats,
    begin,
    end,
    cols,
    D,
    units,
    n1,
    n2,
    stride0,
    stride1,
    stride2,
    SUM: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """a^T b [BLOCK_D, BLOCK_R] and with SUM the sums of a [BLOCK_D], over rows begin ... end - 1.

    With stats, b is multiplied by a row's rstd, and an fp32 a is taken less its mean. The sum is a
    product with ones: to take a from its buffer a second time, into registers, would race with the
    asynchronous products on Hopper (Triton 3.7 keeps one buffer too few for such a load).
    """
    dtype: tl.constexpr = a.dtype.element_ty
    product = tl.zeros([cols.shape[0], units.shape[0]], tl.float32)
    ones = tl.full([BLOCK_M, 16], 1.0, dtype)
    total = tl.zeros([cols.shape[0], 16], tl.float32)
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        in_rows = rows < end
        offsets = _row_offsets(rows, n1, n2, stride0, stride1, stride2, ROW_DIMS)
        a_tile = tl.load(
            a + offsets[:, None] + cols[None, :],
            mask=in_rows[:, None] & (cols < D)[None, :],
            other=0.0,
        )
        if b is not None:
            b_tile = tl.load(
                b + rows.to(tl.int64)[:, None] * R + units[None, :],
                mask=in_rows[:, None],
                other=0.0,
            )
            if stats is not None:
                mean, rstd = _load_stats(stats, rows, in_rows)
                b_tile = (b_tile.to(tl.float32) * rstd[:, None]).to(dtype)
                if dtype == tl.float32:
                    a_tile -= mean[:, None]
            product = tl.dot(tl.trans(a_tile), b_tile, product, input_precision=PRECISION)
        if SUM:
            total = tl.dot(tl.trans(a_tile), ones, total, input_precision=PRECISION)
    return product, tl.sum(total, 1) / 16


@triton.jit(do_not_specialize=["M", "n1", "n2", "rows_per_split"])
def _weights_kernel(
    dy,
    x,
    dz,
    h,
    stats,
    down_product,
    down_sum,
    up_product,
    up_sum,
    M,
    D,
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
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums over one range of rows, each where its pointer [splits, ...] is not None.

    One half of the programs forms x^T b [D, R], with b = rstd dz (dz without norm), and the sums of
    dz and of mean b [2, R]; the other half dy^T h [D, R] and the sum of dy [D].
    """
    dtype: tl.constexpr = x.dtype.element_ty
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    units = tl.program_id(1) // 2 * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2).to(tl.int64)
    begin = tl.program_id(2).to(M.dtype) * rows_per_split
    end = tl.minimum(begin + rows_per_split, M)
    place = (split * D + cols)[:, None] * R + units[None, :]
    if tl.program_id(1) % 2 == 0:
        if down_product is not None:
            product, _ = _transposed_product(
                x, dz, stats, begin, end, cols, D, units, n1, n2, x_stride0, x_stride1, x_stride2,
                False, ROW_DIMS, PRECISION, R, BLOCK_M,
            )  # fmt: skip
            tl.store(down_product + place, product, mask=inside[:, None])
        if down_sum is not None and tl.program_id(0) == 0:
            dz_total = tl.zeros([BLOCK_R], tl.float32)
            mean_total = tl.zeros([BLOCK_R], tl.float32)
            for start in range(begin, end, BLOCK_M):
                rows = start + tl.arange(0, BLOCK_M)
                in_rows = rows < end
                tile = rows.to(tl.int64)[:, None] * R + units[None, :]
                b = tl.load(dz + tile, mask=in_rows[:, None], other=0.0).to(tl.float32)
                dz_total += tl.sum(b, 0)
                if stats is not None:
                    mean, rstd = _load_stats(stats, rows, in_rows)
                    b = (b * rstd[:, None]).to(dtype).to(tl.float32)
                    mean_total += _sum_of_products(b, mean[:, None], 0)
            tl.store(down_sum + split * 2 * R + units, dz_total)
            tl.store(down_sum + (split * 2 + 1) * R + units, mean_total)
    elif up_product is not None or up_sum is not None:
        product, total = _transposed_product(
            dy, h, None, begin, end, cols, D, units, n1, n2, dy_stride0, dy_stride1, dy_stride2,
            up_sum is not None, ROW_DIMS, PRECISION, R, BLOCK_M,
        )  # fmt: skip
        if up_product is not None:
            tl.store(up_product + place, product, mask=inside[:, None])
        if up_sum is not None and tl.program_id(1) == 1:
            tl.store(up_sum + split * D + cols, total, mask=inside)


@triton.jit(do_not_specialize=["splits"])
def _reduce_kernel(
    down_product,
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
    splits,
    D,
    r,
    DTYPE: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the splits in order, and form the gradients.

    With P = norm(x)^T dz before gain and offset, S = sum dz, G = dy^T h and T = sum dy:
    dWd = (gamma P + beta S)^T, d gamma = sum_r Wd^T P, d beta = Wd^T S, dbd = S,
    dWu = s G, ds = sum_r Wu G + bu T, dbu = s T.
    """
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    gain = tl.full([BLOCK_D], 1.0, tl.float32)
    if norm_weight is not None:
        gain = _load_vector(norm_weight, cols, inside, DTYPE)
    s = tl.full([BLOCK_D], 1.0, tl.float32) * scale_value
    if scale is not None:
        s = _load_vector(scale, cols if CHANNEL_SCALE else cols * 0, inside, DTYPE)
    gain_gradient = tl.zeros([BLOCK_D], tl.float32)
    offset_gradient = tl.zeros([BLOCK_D], tl.float32)
    scale_gradient = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, R, BLOCK_R):
        units = first + tl.arange(0, BLOCK_R)
        whole = inside[:, None] & (units < r)[None, :]
        place = cols[:, None] * R + units[None, :]
        transposed = units[None, :] * D + cols[:, None]
        straight = cols[:, None] * r + units[None, :]
        if down_sum is not None:
            dz_total = tl.zeros([BLOCK_R], tl.float32)
            mean_total = tl.zeros([BLOCK_R], tl.float32)
            for i in range(splits):
                dz_total += tl.load(down_sum + 2 * i * R + units)
                mean_total += tl.load(down_sum + (2 * i + 1) * R + units)
            if d_down_bias is not None and tl.program_id(0) == 0:
                tl.store(d_down_bias + units, dz_total, mask=units < r)
        if d_norm_weight is not None or d_norm_bias is not None:
            w = tl.load(down_weight + transposed, mask=whole, other=0.0).to(DTYPE).to(tl.float32)
        if d_norm_bias is not None:
            offset_gradient += _sum_of_products(w, dz_total[None, :], 1)
        if down_product is not None:
            product = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
            for i in range(splits):
                partial = down_product + tl.cast(i, tl.int64) * D * R
                product += tl.load(partial + place, mask=inside[:, None], other=0.0)
            if norm_weight is not None and not (DTYPE == tl.float32):  # noqa: SIM201, SIM300
                product -= mean_total[None, :]
            if d_norm_weight is not None:
                gain_gradient += _sum_of_products(w, product, 1)
            if d_down_weight is not None:
                out = product * gain[:, None]
                if norm_bias is not None:
                    offset = _load_vector(norm_bias, cols, inside, DTYPE)
                    out += offset[:, None] * dz_total[None, :]
                tl.store(d_down_weight + transposed, out, mask=whole)
        if up_product is not None:
            product = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
            for i in range(splits):
                partial = up_product + tl.cast(i, tl.int64) * D * R
                product += tl.load(partial + place, mask=inside[:, None], other=0.0)
            if d_up_weight is not None:
                tl.store(d_up_weight + straight, product * s[:, None], mask=whole)
            if d_scale is not None:
                w = tl.load(up_weight + straight, mask=whole, other=0.0).to(DTYPE).to(tl.float32)
                scale_gradient += _sum_of_products(w, product, 1)
    if d_norm_weight is not None:
        tl.store(d_norm_weight + cols, gain_gradient, mask=inside)
    if d_norm_bias is not None:
        tl.store(d_norm_bias + cols, offset_gradient, mask=inside)
    if up_sum is not None:
        dy_total = tl.zeros([BLOCK_D], tl.float32)
        for i in range(splits):
            dy_total += tl.load(up_sum + tl.cast(i, tl.int64) * D + cols, mask=inside, other=0.0)
        if d_up_bias is not None:
            tl.store(d_up_bias + cols, dy_total * s, mask=inside)
        if up_bias is not None:
            scale_gradient += _load_vector(up_bias, cols, inside, DTYPE) * dy_total
    if d_scale is not None:
        tl.store(d_scale + cols, scale_gradient, mask=inside)


class Tile(NamedTuple):
    """Rows and columns of a kernel's tile, warps of a program, stages of its pipelined loads."""

    block_m: int
    block_d: int
    warps: int
    stages: int


# The tile of each kernel by the largest BLOCK_R that it is for. What was weighed: no spilled
# registers, two programs a processor for r <= 64 without LayerNorm and dropout, whole 128-byte
# lines, and that the rows of all resident programs fit the L2 cache (64 of D = 1024 in 16 bit:
# 128 KB a program). docs/triton-resources.md lists what each takes.
TILES = {
    "_forward_kernel": {128: Tile(64, 64, 8, 3)},
    "_backward_kernel": {64: Tile(64, 64, 8, 3), 128: Tile(64, 64, 16, 3)},
    "_weights_kernel": {
        32: Tile(32, 128, 8, 3),
        64: Tile(64, 128, 8, 3),
        128: Tile(32, 128, 8, 3),
    },
}
# Hopper and datacentre Blackwell: products of at most 8 warps from shared memory, and an L2 so slow
# beside the HBM that the forward reads the weights for 128 rows at once.
WGMMA_TILES = TILES | {
    "_forward_kernel": {32: Tile(64, 64, 8, 3), 128: Tile(128, 64, 8, 3)},
    "_backward_kernel": {128: Tile(64, 64, 8, 3)},
    "_weights_kernel": {128: Tile(64, 128, 8, 3)},
}
# 64 KB of shared memory, and warps of 64 threads.
AMD_TILES = {
    "_forward_kernel": {128: Tile(64, 64, 4, 2)},
    "_backward_kernel": {64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 4, 2)},
    "_weights_kernel": {128: Tile(64, 128, 4, 2)},
}
FLOAT32_TILES = {
    "_forward_kernel": {64: Tile(32, 32, 8, 2)},
    "_backward_kernel": {64: Tile(32, 32, 8, 2)},
    "_weights_kernel": {64: Tile(32, 32, 4, 2)},
}
REDUCE_BLOCK_D = 8
NORM_BLOCK_R = 4
NORM_BLOCK_D = 256


def max_block_r(dtype: torch.dtype) -> int:
    return 64 if dtype == torch.float32 else 128


def tile(kernel: str, d: int, block_r: int, dtype: torch.dtype, arch: str) -> Tile:
    """The tile of a kernel, by its name, for x [M, d] on ``arch`` ("sm_90", "gfx942"); not by M."""
    if dtype == torch.float32:
        tiles = FLOAT32_TILES
    elif arch.startswith("gfx"):
        tiles = AMD_TILES
    elif arch.startswith(("sm_90", "sm_10")):
        tiles = WGMMA_TILES
    else:
        tiles = TILES
    chosen = next(tile for most, tile in tiles[kernel].items() if block_r <= most)
    return chosen._replace(block_d=min(chosen.block_d, max(16, triton.next_power_of_2(d))))


@functools.cache
def _architecture(index: int) -> str:
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def architecture() -> str:
    """Of the current device, as in "sm_90" or "gfx942"; the oldest for Triton's interpreter."""
    if triton.knobs.runtime.interpret:
        return "sm_80"
    return _architecture(triton.runtime.driver.active.get_current_device())


@functools.cache
def processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _tuned(kernel: Any) -> Any:
    """``kernel`` choosing its tile by timing, once for each D, R and dtypes; kept on disk."""
    tiles = itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
    configs = [
        triton.Config({"BLOCK_M": m, "BLOCK_D": d}, num_warps=warps, num_stages=stages)
        for m, d, warps, stages in tiles
    ]
    return triton.autotune(configs, key=["D", "R"], cache_results=True)(kernel)


class Problem(NamedTuple):
    """What every launch of one call shares."""

    device: torch.device
    dtype: torch.dtype
    m: int
    d: int
    r: int
    block_r: int
    padded_r: int
    precision: str
    keep_scale: float
    threshold: int

    @property
    def triton_dtype(self) -> Any:
        return getattr(tl, str(self.dtype).removeprefix("torch."))

    def launch(self, kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        """Run ``kernel`` on a grid that may depend on BLOCK_M and BLOCK_D."""
        meta |= {"PRECISION": self.precision, "R": self.padded_r, "BLOCK_R": self.block_r}
        if os.environ.get("FASTADAPTERS_AUTOTUNE", "0") == "1":
            _tuned(kernel)[grid](*args, **meta)
            return
        block_m, block_d, warps, stages = tile(
            kernel.__name__, self.d, self.block_r, self.dtype, architecture()
        )
        kernel[grid](
            *args, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=warps, num_stages=stages, **meta
        )

    def guard(self) -> contextlib.AbstractContextManager[Any]:
        """Make the tensors' device the current one."""
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.cuda.device(self.device)


def _problem(x: Tensor, down_weight: Tensor, dropout: float) -> Problem:
    d, r = x.shape[-1], down_weight.shape[0]
    block_r = min(max(16, triton.next_power_of_2(r)), max_block_r(x.dtype))
    tf32 = torch.get_float32_matmul_precision() != "highest" and torch.version.hip is None
    return Problem(
        x.device,
        x.dtype,
        x.numel() // d,
        d,
        r,
        block_r,
        triton.cdiv(r, block_r) * block_r,
        "tf32" if tf32 else "ieee",
        1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0,
        dropout_threshold(dropout),
    )


def _rows(*tensors: Tensor) -> tuple[int, list[int]]:
    """(dimensions that the rows of all these [..., D] need, [n1, n2, three strides a tensor]).

    Neighbouring dimensions become one wherever the strides of every tensor allow it.
    """
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for i, size in enumerate(tensors[0].shape[:-1]):
        if size == 1:
            continue
        merge = bool(sizes) and all(
            s[-1] == size * t.stride(i) for s, t in zip(strides, tensors, strict=True)
        )
        if merge:
            sizes[-1] *= size
        else:
            sizes.append(size)
        for s, t in zip(strides, tensors, strict=True):
            s[len(sizes) - 1 :] = [t.stride(i)]
    pad = 3 - len(sizes)
    n1, n2 = ([1] * pad + sizes)[1:]
    return max(len(sizes), 1), [n1, n2, *(n for s in strides for n in [0] * pad + s)]


def _norm_products(
    p: Problem, down_weight: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> Tensor | None:
    if norm_weight is None:
        return None
    products = torch.empty(3, p.padded_r, dtype=torch.float32, device=p.device)
    _norm_kernel[(p.padded_r // NORM_BLOCK_R,)](
        products,
        down_weight,
        norm_weight,
        norm_bias,
        p.d,
        p.r,
        DTYPE=p.triton_dtype,
        R=p.padded_r,
        BLOCK_R=NORM_BLOCK_R,
        BLOCK_D=NORM_BLOCK_D,
    )
    return products


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _per_channel(scale: Tensor | None, d: int) -> bool:
    return scale is not None and scale.numel() == d


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
    activation: int,
    add_x: bool,
) -> None:
    """``fastadapters::bottleneck_forward_out``: fills y, and stats where given; z is not used."""
    if x.numel() == 0:
        return
    p = _problem(x, down_weight, dropout)
    if add_x:
        residual = x
    down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, scale = _contiguous(
        down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, scale
    )  # type: ignore[assignment]
    row_dims, rows = _rows(x, x if residual is None else residual, y)
    with p.guard():
        p.launch(
            _forward_kernel,
            lambda meta: (triton.cdiv(p.m, meta["BLOCK_M"]),),
            x,
            residual,
            y,
            stats,
            x.new_empty(p.m, p.padded_r) if p.padded_r > p.block_r else None,
            down_weight,
            down_bias,
            up_weight,
            up_bias,
            norm_weight,
            _norm_products(p, down_weight, norm_weight, norm_bias),
            scale,
            seed,
            scale_value,
            norm_eps,
            p.keep_scale,
            p.threshold,
            p.m,
            p.d,
            p.r,
            *rows,
            ACTIVATION=activation,
            CHANNEL_SCALE=_per_channel(scale, p.d),
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
    activation: int,
    add_x: bool,
) -> None:
    """``fastadapters::bottleneck_backward_out``: fills what is not None; z is not used."""
    parameter_gradients = (
        d_down_weight,
        d_down_bias,
        d_up_weight,
        d_up_bias,
        d_norm_weight,
        d_norm_bias,
        d_scale,
    )
    if x.numel() == 0:
        for gradient in parameter_gradients:
            if gradient is not None:
                gradient.zero_()
        return
    p = _problem(x, down_weight, dropout)
    if dy.stride(-1) != 1 or dy.dim() > 4:
        dy = dy.contiguous()
    if norm_weight is None:
        stats = None
    channel_scale = _per_channel(scale, p.d)
    down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, scale = _contiguous(
        down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, scale
    )  # type: ignore[assignment]

    needs_down_product = d_down_weight is not None or d_norm_weight is not None
    needs_down_sum = (
        d_down_bias is not None
        or d_norm_bias is not None
        or (norm_weight is not None and needs_down_product)
    )
    needs_up_product = d_up_weight is not None or d_scale is not None
    needs_up_sum = d_up_bias is not None or (d_scale is not None and up_bias is not None)
    needs_dz = needs_down_product or needs_down_sum
    dz = h = None
    if needs_dz or (dx is not None and p.padded_r > p.block_r):
        dz = x.new_empty(p.m, p.padded_r)
    if needs_up_product:
        h = x.new_empty(p.m, p.padded_r)

    with p.guard():
        if dx is not None or dz is not None or h is not None:
            row_dims, rows = _rows(dy, x, x if dx is None else dx)
            p.launch(
                _backward_kernel,
                lambda meta: (triton.cdiv(p.m, meta["BLOCK_M"]),),
                dy,
                x,
                dx,
                dz,
                h,
                stats,
                down_weight,
                down_bias,
                up_weight,
                norm_weight,
                _norm_products(p, down_weight, norm_weight, norm_bias),
                scale,
                seed,
                scale_value,
                p.keep_scale,
                p.threshold,
                p.m,
                p.d,
                p.r,
                *rows,
                ACTIVATION=activation,
                CHANNEL_SCALE=channel_scale,
                ADD_X=add_x,
                ROW_DIMS=row_dims,
            )
        if all(gradient is None for gradient in parameter_gradients):
            return

        blocks_r = p.padded_r // p.block_r
        # Two programs a processor with tiles of 128 columns; splits are whole tiles of any height.
        most = max(1, processors(p.device) // (triton.cdiv(p.d, 128) * blocks_r))
        rows_per_split = 128 * triton.cdiv(p.m, 128 * most)
        splits = triton.cdiv(p.m, rows_per_split)

        def partial(needed: bool, *shape: int) -> Tensor | None:
            return x.new_empty(splits, *shape, dtype=torch.float32) if needed else None

        partials = (
            partial(needs_down_product, p.d, p.padded_r),
            partial(needs_down_sum, 2, p.padded_r),
            partial(needs_up_product, p.d, p.padded_r),
            partial(needs_up_sum, p.d),
        )
        row_dims, rows = _rows(dy, x)
        p.launch(
            _weights_kernel,
            lambda meta: (triton.cdiv(p.d, meta["BLOCK_D"]), 2 * blocks_r, splits),
            dy,
            x,
            dz,
            h,
            stats,
            *partials,
            p.m,
            p.d,
            *rows,
            rows_per_split,
            ROW_DIMS=row_dims,
        )
        d_scales = d_scale
        if d_scale is not None and not channel_scale:
            d_scales = x.new_empty(p.d, dtype=torch.float32)
        _reduce_kernel[(triton.cdiv(p.d, REDUCE_BLOCK_D),)](
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
            splits,
            p.d,
            p.r,
            DTYPE=p.triton_dtype,
            CHANNEL_SCALE=channel_scale,
            R=p.padded_r,
            BLOCK_R=p.block_r,
            BLOCK_D=REDUCE_BLOCK_D,
        )
        if d_scale is not None and not channel_scale:
            d_scale.copy_(d_scales.sum(0, keepdim=True))


def bottleneck_forward(
    x: Tensor, residual: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastadapters::bottleneck_forward``."""
    *inputs, save = rest
    y = x.new_empty(x.shape)
    z, stats = allocate_saved(x, inputs[0], inputs[4], save)
    bottleneck_forward_out(y, None, stats if stats.numel() else None, x, residual, *inputs)
    return y, z, stats


def bottleneck_backward(
    dy: Tensor, x: Tensor, z: Tensor, stats: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """``fastadapters::bottleneck_backward``."""
    *inputs, needs = rest
    gradients = allocate_gradients(x, inputs[: len(PARAMETERS)], needs)
    wanted = (g if needs >> i & 1 else None for i, g in enumerate(gradients))
    bottleneck_backward_out(*wanted, dy, x, z, stats, *inputs)
    return gradients

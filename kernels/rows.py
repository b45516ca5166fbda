"""Rows of tensors [n0, n1, n2, D] at any three strides: their offsets and statistics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def row_offsets(rows, n1, n2, stride0, stride1, stride2, ROW_DIMS: tl.constexpr):
    """Where rows of a tensor [n0, n1, n2, D] begin; of n0, n1, n2 the last ROW_DIMS are there."""
    if ROW_DIMS == 1:
        return rows.to(tl.int64) * stride2
    outer = rows // n2
    offsets = (rows % n2).to(tl.int64) * stride2
    if ROW_DIMS == 2:
        return offsets + outer.to(tl.int64) * stride1
    return offsets + (outer % n1).to(tl.int64) * stride1 + (outer // n1).to(tl.int64) * stride0


@triton.jit
def rows_at(order, places, inside):
    """The rows at places of an order; without one they are the places."""
    if order is None:
        return places
    else:
        return tl.load(order + places, mask=inside, other=0).to(places.dtype)


@triton.jit
def load_vector(pointer, index, inside, dtype: tl.constexpr):
    """A parameter's elements rounded to the compute dtype, in fp32."""
    return tl.load(pointer + index, mask=inside, other=0.0).to(dtype).to(tl.float32)


@triton.jit
def load_stats(stats, rows, in_rows):
    """The mean and the reciprocal standard deviation of rows, from stats [M, 2]."""
    pair = stats + rows.to(tl.int64) * 2
    return tl.load(pair, mask=in_rows, other=0.0), tl.load(pair + 1, mask=in_rows, other=0.0)


@triton.jit
def sum_of_products(a, b, axis: tl.constexpr):
    """tl.sum(a * b, axis), rounded alike in all the threads that hold the result.

    Left to itself the compiler fuses a thread's product into its sum with a neighbour's, and the
    neighbour the other way round. A fused product is not fused again.
    """
    return tl.sum(tl.fma(a, tl.broadcast_to(b, a.shape), tl.zeros_like(a)), axis)


@triton.jit
def moments(x, offsets, in_rows, D, BLOCK_D: tl.constexpr):
    """Mean and variance of rows, from sums about the mean of their first block: no cancellation.

    That mean is taken about the first element: it is exact where a row is constant.
    """
    shift = tl.zeros([in_rows.shape[0]], tl.float32)
    total = tl.zeros([in_rows.shape[0], BLOCK_D], tl.float32)
    squares = tl.zeros([in_rows.shape[0], BLOCK_D], tl.float32)
    for k in tl.range(0, D, BLOCK_D, num_stages=3):
        cols = k + tl.arange(0, BLOCK_D)
        inside = cols < D
        whole = in_rows[:, None] & inside[None, :]
        a = tl.load(x + offsets[:, None] + cols[None, :], mask=whole, other=0.0)
        a = a.to(tl.float32)
        if k == 0:
            first = tl.sum(tl.where(cols[None, :] == 0, a, 0.0), 1)
            about = tl.where(inside[None, :], a - first[:, None], 0.0)
            shift = first + tl.sum(about, 1) / tl.minimum(D, BLOCK_D)
        a = tl.where(inside[None, :], a - shift[:, None], 0.0)
        total += a
        squares += a * a
    mean = tl.sum(total, 1) / D
    return shift + mean, tl.sum(squares, 1) / D - mean * mean


def rows_of(*tensors: Tensor) -> tuple[int, list[int]]:
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

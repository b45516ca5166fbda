"""Sums of tiles, and the products that give the gradients of features and parameters."""

from __future__ import annotations

import triton
import triton.language as tl

from ..products import multiply
from .features import store_tile

TERMS = tl.constexpr(16)  # added at once


@triton.jit
def _sum_of_parts(parts, n, size, element, inside, BLOCK: tl.constexpr):
    """Sums over n of parts [n, size], in order: TERMS at a time."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, TERMS):
        part = (start + tl.arange(0, TERMS)).to(tl.int64)
        value = tl.load(
            parts + (part * size)[:, None] + element[None, :],
            mask=(part < n)[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(value, 0)
    return total


@triton.jit(
    do_not_specialize=["n0", "n1", "n2", "size0", "size1", "size2"],
    do_not_specialize_on_alignment=["out0", "out1", "out2"],  # behind as many rows as texts
)
def sums_kernel(
    parts0,
    parts1,
    parts2,
    out0,
    out1,
    out2,
    n0,
    n1,
    n2,
    size0,
    size1,
    size2,
    BLOCK: tl.constexpr,
):
    """Of up to three arrays parts [n, size] the sums over n; program 1 chooses the array."""
    element = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    if tl.program_id(1) == 0:
        if parts0 is not None:
            total = _sum_of_parts(parts0, n0, size0, element, element < size0, BLOCK)
            tl.store(out0 + element, total, mask=element < size0)
    elif tl.program_id(1) == 1:
        if parts1 is not None:
            total = _sum_of_parts(parts1, n1, size1, element, element < size1, BLOCK)
            tl.store(out1 + element, total, mask=element < size1)
    elif parts2 is not None:
        total = _sum_of_parts(parts2, n2, size2, element, element < size2, BLOCK)
        tl.store(out2 + element, total, mask=element < size2)


@triton.jit(do_not_specialize=["C", "J"])
def similarity_kernel(
    d_features,
    d_similarity,
    features,
    d_products,
    d_constants,
    last_weight,
    last_bias,
    width,
    C,
    J,
    D,
    R,
    TEXTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """d_features [C + J, D] of texts (if asked for) and of the J others, from d_similarity [C, J].

    And from those of products with the last layer, d_products [C + J, R] and d_constants, whose
    rows are ``width`` apart.
    """
    text_blocks = tl.cdiv(C, BLOCK_M)
    if not TEXTS:
        text_blocks = 0
    others = tl.program_id(0) >= text_blocks
    rows = (tl.program_id(0) - tl.where(others, text_blocks, 0)) * BLOCK_M
    rows = (rows + tl.arange(0, BLOCK_M)).to(tl.int64)
    in_rows = rows < tl.where(others, J, C)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < D
    first = C.to(tl.int64)
    tile = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if others:
        tile = multiply(
            tile, d_similarity, rows, in_rows, J, features, cols, inside, D, C, PRECISION, BLOCK_K
        )
    elif TEXTS:
        tile = multiply(
            tile, d_similarity, rows * J, in_rows, 1, features + first * D, cols, inside, D, J,
            PRECISION, BLOCK_K,
        )  # fmt: skip
    rows += tl.where(others, first, 0)
    if d_products is not None:
        tile = multiply(
            tile, d_products, rows * width, in_rows, 1,
            last_weight, cols.to(tl.int64) * R, inside, 1, R, PRECISION, BLOCK_K,
        )  # fmt: skip
        constant = tl.load(d_constants + rows * width, mask=in_rows, other=0.0)
        bias = tl.load(last_bias + cols, mask=inside, other=0.0).to(tl.float32)
        tile += constant[:, None] * bias[None, :]
    store_tile(d_features, rows, in_rows, D, cols, D, tile)

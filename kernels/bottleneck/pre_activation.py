"""z, the input of the activation, with LayerNorm folded into the product."""

from __future__ import annotations

import triton
import triton.language as tl

from ..products import contract
from ..rows import load_vector


@triton.jit
def norm_kernel(
    norm_products,
    down_weight,
    norm_weight,
    norm_bias,
    firsts,
    D,
    r,
    DTYPE: tl.constexpr,
    X_DTYPE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums over D of Wd gamma and of Wd beta: [2, R], of stacks [N, 2, R].

    An adapter that occurs has a run: its first is not that of the next.
    """
    if firsts is not None:
        own = tl.program_id(1).to(tl.int64)
        if tl.load(firsts + own) == tl.load(firsts + own + 1):
            return
        norm_products += own * (2 * R)
        down_weight += own * (r * D)
        norm_weight += own * D
        if norm_bias is not None:
            norm_bias += own * D
    units = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    gained = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
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
        gained += w * load_vector(norm_weight, cols, inside, X_DTYPE)[None, :]
        if norm_bias is not None:
            offset += w * load_vector(norm_bias, cols, inside, X_DTYPE)[None, :]
    tl.store(norm_products + units, tl.sum(gained, 1))
    tl.store(norm_products + R + units, tl.sum(offset, 1))


@triton.jit
def pre_activation(
    x,
    x_rows,
    in_rows,
    mean,
    rstd,
    down_weight,
    down_bias,
    norm_weight,
    norm_bias,
    norm_products,
    input_seed,
    input_keep,
    input_threshold,
    rows,
    units,
    D,
    r,
    R: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z [BLOCK_M, BLOCK_R], and z without its offsets Wd beta and bd.

    With an input_seed what is kept of beta differs from row to row: bd alone is an offset then.
    """
    if input_seed is None:
        centred = contract(
            x, x_rows, in_rows, mean, rstd, norm_weight, down_weight, D, 1, None, units, D, r,
            DTYPE, PRECISION, BLOCK_D,
        )  # fmt: skip
    else:
        centred = input_keep * contract(
            x, x_rows, in_rows, mean, rstd, norm_weight, down_weight, D, 1, None, units, D, r,
            DTYPE, PRECISION, BLOCK_D, norm_bias, input_seed, rows, input_threshold,
        )  # fmt: skip
    z = centred
    if norm_weight is not None and input_seed is None:
        z += tl.load(norm_products + R + units)[None, :]
    if down_bias is not None:
        z += load_vector(down_bias, units, units < r, DTYPE)[None, :]
    return z, centred

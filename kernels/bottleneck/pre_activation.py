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
    D,
    r,
    DTYPE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums over D of Wd gamma rounded as `contract` does, of Wd gamma, and of Wd beta: [3, R]."""
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
        gained = w * load_vector(norm_weight, cols, inside, DTYPE)[None, :]
        rounded += gained.to(DTYPE).to(tl.float32)
        exact += gained
        if norm_bias is not None:
            offset += w * load_vector(norm_bias, cols, inside, DTYPE)[None, :]
    tl.store(norm_products + units, tl.sum(rounded, 1))
    tl.store(norm_products + R + units, tl.sum(exact, 1))
    tl.store(norm_products + 2 * R + units, tl.sum(offset, 1))


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
    z = contract(
        x, x_rows, in_rows, shift, down_weight, D, 1, norm_weight, units, D, r, PRECISION, BLOCK_D
    )
    centred = z
    if norm_weight is not None:
        if not EXACT:
            centred -= mean[:, None] * tl.load(norm_products + units)[None, :]
        centred *= rstd[:, None]
        z = centred + tl.load(norm_products + 2 * R + units)[None, :]
    if down_bias is not None:
        z += load_vector(down_bias, units, units < r, dtype)[None, :]
    return z, centred

"""Linear layers of rows, and the products of weights."""

from __future__ import annotations

import triton
import triton.language as tl

from ..activations import activate, activation_backward
from ..products import multiply


@triton.jit
def rows_of_block(n_texts, n_images, BLOCK_M: tl.constexpr):
    """(rows of its group, which of them are there, whether the group is the images) of program 0.

    The blocks of texts come first.
    """
    text_blocks = tl.cdiv(n_texts, BLOCK_M)
    is_image = tl.program_id(0) >= text_blocks
    block = tl.program_id(0) - tl.where(is_image, text_blocks, 0)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    return rows.to(tl.int64), rows < tl.where(is_image, n_images, n_texts), is_image


@triton.jit
def _linear_tile(
    a,
    a_offsets,
    in_rows,
    weight,
    bias,
    gate,
    added,
    out,
    active,
    out_offsets,
    rows,
    stride_n,
    stride_k,
    a_head,
    bias_factor,
    K,
    N,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < N
    tile = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if a is not None:
        tile = multiply(
            tile, a + tl.program_id(2).to(tl.int64) * a_head, a_offsets, in_rows, 1,
            weight, cols.to(tl.int64) * stride_n, inside, stride_k, K,
            PRECISION, BLOCK_K,
        )  # fmt: skip
    whole = in_rows[:, None] & inside[None, :]
    place = rows[:, None] * N + cols[None, :]
    if bias is not None:
        constant = tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
        tile += (constant * bias_factor)[None, :]
    if gate is not None:
        tile = activation_backward(tile, tl.load(gate + place, mask=whole, other=0.0), GATE)
    if added is not None:
        tile += tl.load(added + place, mask=whole, other=0.0)
    place = out_offsets[:, None] + cols[None, :]
    tl.store(out + place, tile.to(out.dtype.element_ty), mask=whole)
    if active is not None:
        tl.store(active + place, activate(tile, ACTIVATION), mask=whole)


@triton.jit(do_not_specialize=["n_texts", "n_images"])
def linear_kernel(
    text,
    image,
    weight,
    bias,
    gate,
    added,
    out_text,
    out_image,
    active_text,
    active_image,
    n_texts,
    n_images,
    text_stride,
    image_stride,
    stride_n,
    stride_k,
    out_stride,
    a_head,
    weight_head,
    out_head,
    bias_factor,
    K,
    N,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a W^T + bias, times act'(gate), plus what is added, of text rows and of image rows.

    Rows that are None are zeros. active is act of the result where it is wanted. gate and added
    are [texts and images, N]; for each head (program 2) a, W and the output begin further on.
    """
    rows, in_rows, is_image = rows_of_block(n_texts, n_images, BLOCK_M)
    head = tl.program_id(2).to(tl.int64)
    weight += head * weight_head
    if is_image:
        if out_image is not None:
            _linear_tile(
                image, rows * image_stride, in_rows, weight, bias, gate, added,
                out_image + head * out_head, active_image, rows * out_stride, rows + n_texts,
                stride_n, stride_k, a_head, bias_factor, K, N,
                ACTIVATION, GATE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        if out_text is not None:
            _linear_tile(
                text, rows * text_stride, in_rows, weight, bias, gate, added,
                out_text + head * out_head, active_text, rows * out_stride, rows,
                stride_n, stride_k, a_head, bias_factor, K, N,
                ACTIVATION, GATE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@triton.jit
def column(matrix, step, vector, vector_step, offsets, inside, K, BLOCK_N: tl.constexpr):
    """matrix^T vector: sums over K of matrix[k, offsets] vector[k], or of matrix[k, offsets]."""
    total = tl.zeros([16, BLOCK_N], tl.float32)
    for k in range(0, K, 16):
        steps = k + tl.arange(0, 16)
        in_steps = steps < K
        steps = steps.to(tl.int64)
        value = tl.load(
            matrix + (steps * step)[:, None] + offsets[None, :],
            mask=in_steps[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        if vector is not None:
            factor = tl.load(vector + steps * vector_step, mask=in_steps, other=0.0)
            value *= factor.to(tl.float32)[:, None]
        total += value
    return tl.sum(total, 0)


@triton.jit
def weights_kernel(
    out_weight,
    out_bias,
    up_weight,
    up_bias,
    last_weight,
    last_bias,
    inner_weight,
    inner_bias,
    gram,
    D,
    E,
    R,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """up out [R, E] and its bias (program 2 is 0); W^T W, W^T b and b^T b (program 2 is 1).

    W [D, R] and b [D] are the last layer's; they lie in gram [R R + R + 1] in this order.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < R
    tile = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    if tl.program_id(2) == 0:
        if inner_weight is not None:
            in_cols = cols < E
            tile = multiply(
                tile, up_weight, rows * E, in_rows, 1, out_weight, cols, in_cols, E, E,
                PRECISION, BLOCK_K,
            )  # fmt: skip
            place = inner_weight + rows[:, None] * E + cols[None, :]
            tl.store(place, tile, mask=in_rows[:, None] & in_cols[None, :])
            if tl.program_id(1) == 0:
                bias = column(up_weight, 1, out_bias, 1, rows * E, in_rows, E, BLOCK_N)
                bias += tl.load(up_bias + rows, mask=in_rows, other=0.0).to(tl.float32)
                tl.store(inner_bias + rows, bias, mask=in_rows)
    elif gram is not None:
        in_cols = cols < R
        tile = multiply(
            tile, last_weight, rows, in_rows, R, last_weight, cols, in_cols, R, D,
            PRECISION, BLOCK_K,
        )  # fmt: skip
        place = gram + rows[:, None] * R + cols[None, :]
        tl.store(place, tile, mask=in_rows[:, None] & in_cols[None, :])
        if tl.program_id(1) == 0:
            product = column(last_weight, R, last_bias, 1, rows, in_rows, D, BLOCK_N)
            tl.store(gram + R * R + rows, product, mask=in_rows)
            if tl.program_id(0) == 0:
                one = tl.arange(0, 16)
                square = column(last_bias, 1, last_bias, 1, one * 0, one == 0, D, 16)
                tl.store(gram + R * R + R + one, square, mask=one == 0)

"""Unit features: the adapter's output blended with what came in, and the way back."""

from __future__ import annotations

import triton
import triton.language as tl

from ..products import multiply
from .blend import portions
from .linear import rows_of_block

FLOOR = tl.constexpr(1e-12)  # of a length that divides, as in torch.nn.functional.normalize


@triton.jit
def inverse_length(square):
    return 1.0 / tl.maximum(tl.sqrt_rn(square), FLOOR)


@triton.jit
def load_tile(base, rows, in_rows, stride, cols, n):
    return tl.load(
        base + (rows * stride)[:, None] + cols[None, :],
        mask=in_rows[:, None] & (cols < n)[None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def store_tile(base, rows, in_rows, stride, cols, n, tile):
    tl.store(
        base + (rows * stride)[:, None] + cols[None, :],
        tile,
        mask=in_rows[:, None] & (cols < n)[None, :],
    )


@triton.jit
def _up(
    e,
    rows,
    in_rows,
    weight,
    bias,
    cols,
    D,
    R,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The last layer, W e + b."""
    inside = cols < D
    tile = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    tile = multiply(
        tile, e, rows * R, in_rows, 1, weight, cols.to(tl.int64) * R, inside, 1, R,
        PRECISION, BLOCK_K,
    )  # fmt: skip
    return tile + tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _new_features(
    x,
    x_stride,
    e,
    item_e,
    u,
    item_u,
    lengths,
    item_lengths,
    features,
    item_features,
    item_dot,
    rows,
    in_rows,
    weight,
    bias,
    blend,
    rest,
    D,
    R,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Unit rows: of x, or where there is e of what it makes, u, blended with x.

    lengths [rows, 3]: of x, u and the blend. Where there is item_e its u are made unit vectors
    too, and item_dot is their product with the features.
    """
    squares = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    new_squares = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    item_squares = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        value = load_tile(x, rows, in_rows, x_stride, cols, D)
        squares += value * value
        if e is not None:
            new = _up(e, rows, in_rows, weight, bias, cols, D, R, PRECISION, BLOCK_K)
            new_squares += new * new
            store_tile(u, rows, in_rows, D, cols, D, new)
        if item_e is not None:
            new = _up(item_e, rows, in_rows, weight, bias, cols, D, R, PRECISION, BLOCK_K)
            item_squares += new * new
            store_tile(item_u, rows, in_rows, D, cols, D, new)
    square = tl.sum(squares, 1)
    tl.store(lengths + rows * 3, tl.sqrt_rn(square), mask=in_rows)
    tl.debug_barrier()
    rescale = inverse_length(square)
    if e is not None:
        new_square = tl.sum(new_squares, 1)
        tl.store(lengths + rows * 3 + 1, tl.sqrt_rn(new_square), mask=in_rows)
        x_part = tl.zeros([BLOCK_M], tl.float32) + rest
        if not RAW:
            x_part *= rescale
        new_part = blend * inverse_length(new_square)
        squares = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            value = load_tile(x, rows, in_rows, x_stride, cols, D)
            new = load_tile(u, rows, in_rows, D, cols, D)
            value = new_part[:, None] * new + x_part[:, None] * value
            squares += value * value
        square = tl.sum(squares, 1)
        tl.store(lengths + rows * 3 + 2, tl.sqrt_rn(square), mask=in_rows)
        rescale = inverse_length(square)
        new_part *= rescale
        x_part *= rescale
    else:
        new_part = rescale
        x_part = rescale
    if item_e is not None:
        item_square = tl.sum(item_squares, 1)
        tl.store(item_lengths + rows, tl.sqrt_rn(item_square), mask=in_rows)
        item_rescale = inverse_length(item_square)
    products = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        value = load_tile(x, rows, in_rows, x_stride, cols, D) * x_part[:, None]
        if e is not None:
            value += load_tile(u, rows, in_rows, D, cols, D) * new_part[:, None]
        store_tile(features, rows, in_rows, D, cols, D, value)
        if item_e is not None:
            new = load_tile(item_u, rows, in_rows, D, cols, D) * item_rescale[:, None]
            store_tile(item_features, rows, in_rows, D, cols, D, new)
            products += value * new
    if item_e is not None:
        tl.store(item_dot + rows, tl.sum(products, 1), mask=in_rows)


@triton.jit(do_not_specialize=["C", "B"])
def features_kernel(
    text,
    image,
    e_text,
    e_image,
    e_item,
    u_text,
    u_image,
    u_item,
    lengths,
    item_lengths,
    features,
    item_dot,
    last_weight,
    last_bias,
    products,
    constants,
    blend,
    blend_value,
    rest_value,
    C,
    B,
    D,
    R,
    text_stride,
    image_stride,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """features [C + B (+ B), D]: of texts, of images, and of what texts become that see the image.

    products [C + B, R] and constants [C + B] are theirs with the last layer's weight and bias.
    """
    rows, in_rows, is_image = rows_of_block(C, B, BLOCK_M)
    share, rest = portions(blend, blend_value, rest_value)
    if is_image:
        _new_features(
            image, image_stride, e_image, e_item, u_image, u_item, lengths + C.to(tl.int64) * 3,
            item_lengths, features + C.to(tl.int64) * D, features + (C + B).to(tl.int64) * D,
            item_dot, rows, in_rows, last_weight, last_bias, share, rest, D, R,
            RAW, PRECISION, BLOCK_M, BLOCK_D, BLOCK_K,
        )  # fmt: skip
    else:
        _new_features(
            text, text_stride, e_text, None, u_text, None, lengths, None, features, None, None,
            rows, in_rows, last_weight, last_bias, share, rest, D, R,
            False, PRECISION, BLOCK_M, BLOCK_D, BLOCK_K,
        )  # fmt: skip
    if products is not None:
        tl.debug_barrier()
        rows += tl.where(is_image, C, 0)
        for start in range(0, R, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            tile = multiply(
                tile, features, rows * D, in_rows, 1, last_weight, cols, cols < R, R, D,
                PRECISION, BLOCK_K,
            )  # fmt: skip
            store_tile(products, rows, in_rows, R, cols, R, tile)
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            constant = tl.load(last_bias + cols, mask=cols < D, other=0.0).to(tl.float32)
            total += load_tile(features, rows, in_rows, D, cols, D) * constant[None, :]
        tl.store(constants + rows, tl.sum(total, 1), mask=in_rows)

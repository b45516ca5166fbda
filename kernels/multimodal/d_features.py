"""Backward of unit features: through the blend, and to what the up-sampler gave."""

from __future__ import annotations

import triton
import triton.language as tl

from .blend import portions
from .features import FLOOR, load_tile, store_tile
from .linear import rows_of_block


@triton.jit
def _d_new_features(
    d_features,
    features,
    x,
    x_stride,
    u,
    d_u,
    lengths,
    d_x,
    d_blend,
    rows,
    in_rows,
    blend,
    rest,
    item_features,
    d_item_features,
    d_item_dot,
    item_lengths,
    d_item_u,
    d_squares,
    square_tiles,
    n_rows,
    D,
    RAW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """d_x, d_u and each row's part of d_blend from d_features.

    With f = p / |p|, p = blend u^ + rest x^, rest 1 - blend: dp = (df - f (f.df)) / |p|, and so on;
    no projection where a length was floored. Only sums along D are needed before. d_squares
    [square_tiles, n_rows] are parts of the gradient of |f|^2, which is 1 but where it was floored.
    """
    length = tl.load(lengths + rows * 3, mask=in_rows, other=1.0)
    rescale = 1.0 / tl.maximum(length, FLOOR)
    dot = tl.zeros([BLOCK_M], tl.float32)
    if d_item_dot is not None:
        dot = tl.load(d_item_dot + rows * 2, mask=in_rows, other=0.0)
    fd = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    xd = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    xf = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    ud = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    uf = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    item_d = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        f = load_tile(features, rows, in_rows, D, cols, D)
        d = load_tile(d_features, rows, in_rows, D, cols, D)
        if d_item_dot is not None:
            item = load_tile(item_features, rows, in_rows, D, cols, D)
            d += dot[:, None] * item
            of_item = load_tile(d_item_features, rows, in_rows, D, cols, D) + dot[:, None] * f
            item_d += of_item * item
        fd += f * d
        if u is not None:
            x_hat = load_tile(x, rows, in_rows, x_stride, cols, D)
            if not RAW:
                x_hat *= rescale[:, None]
            new = load_tile(u, rows, in_rows, D, cols, D)
            xd += x_hat * d
            xf += x_hat * f
            ud += new * d
            uf += new * f
    along = tl.sum(fd, 1)
    if u is not None:
        p_length = tl.load(lengths + rows * 3 + 2, mask=in_rows, other=1.0)
        p_rescale = 1.0 / tl.maximum(p_length, FLOOR)
        along = tl.where(p_length >= FLOOR, along, 0.0)
        u_length = tl.load(lengths + rows * 3 + 1, mask=in_rows, other=1.0)
        u_rescale = 1.0 / tl.maximum(u_length, FLOOR)
        x_along = (tl.sum(xd, 1) - tl.sum(xf, 1) * along) * p_rescale
        u_along = (tl.sum(ud, 1) - tl.sum(uf, 1) * along) * p_rescale * u_rescale
        if d_blend is not None:
            tl.store(d_blend + rows, u_along - x_along, mask=in_rows)
        x_along = tl.where(length >= FLOOR, x_along, 0.0)
        u_along = tl.where(u_length >= FLOOR, u_along, 0.0)
    else:
        d_square = tl.zeros([BLOCK_M], tl.float32)
        if d_squares is not None:
            for i in range(square_tiles):
                part = d_squares + i * n_rows.to(tl.int64) + rows
                d_square += tl.load(part, mask=in_rows, other=0.0)
        along = tl.where(length >= FLOOR, along, -2.0 * d_square)
    if d_item_dot is not None:
        item_length = tl.load(item_lengths + rows, mask=in_rows, other=1.0)
        item_rescale = 1.0 / tl.maximum(item_length, FLOOR)
        # A floored vector is shorter than one, and its square is in the length of the blend.
        square = tl.load(d_item_dot + rows * 2 + 1, mask=in_rows, other=0.0)
        item_along = tl.where(item_length >= FLOOR, tl.sum(item_d, 1), -2.0 * square)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        f = load_tile(features, rows, in_rows, D, cols, D)
        d = load_tile(d_features, rows, in_rows, D, cols, D)
        if d_item_dot is not None:
            item = load_tile(item_features, rows, in_rows, D, cols, D)
            d += dot[:, None] * item
            of_item = load_tile(d_item_features, rows, in_rows, D, cols, D) + dot[:, None] * f
            of_item = (of_item - item_along[:, None] * item) * item_rescale[:, None]
            store_tile(d_item_u, rows, in_rows, D, cols, D, of_item)
        d -= along[:, None] * f
        if u is not None:
            d *= p_rescale[:, None]
            if d_u is not None:
                new = load_tile(u, rows, in_rows, D, cols, D) * u_rescale[:, None]
                d_new = (d - u_along[:, None] * new) * (u_rescale * blend)[:, None]
                store_tile(d_u, rows, in_rows, D, cols, D, d_new)
            if not RAW:
                x_hat = load_tile(x, rows, in_rows, x_stride, cols, D) * rescale[:, None]
                d = (d - x_along[:, None] * x_hat) * rescale[:, None]
            d *= rest
        else:
            d *= rescale[:, None]
        if d_x is not None:
            store_tile(d_x, rows, in_rows, D, cols, D, d)


@triton.jit(do_not_specialize=["C", "B", "square_tiles"])
def d_features_kernel(
    d_features,
    features,
    text,
    image,
    u_text,
    u_image,
    d_u_text,
    d_u_image,
    lengths,
    d_text,
    d_image,
    d_blend,
    item_dot,
    item_lengths,
    d_u_item,
    d_squares,
    square_tiles,
    blend,
    blend_value,
    rest_value,
    C,
    B,
    D,
    text_stride,
    image_stride,
    TEXTS: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradients of text, image and up-sampled rows; of the former but what the adapter adds.

    d_features is as features in ``features_kernel``; item_dot [B, 2] the gradients of item_dot
    there and of |item|^2, d_squares [square_tiles, C] parts of those of texts' squares; d_blend
    [C + B] the rows' parts of it.
    """
    rows, in_rows, is_image = rows_of_block(C, B, BLOCK_M)
    share, rest = portions(blend, blend_value, rest_value)
    if is_image:
        first = C.to(tl.int64)
        second = (C + B).to(tl.int64)
        d_blend_image = d_blend
        if d_blend is not None:
            d_blend_image += first
        _d_new_features(
            d_features + first * D, features + first * D, image, image_stride, u_image,
            d_u_image, lengths + first * 3, d_image, d_blend_image, rows, in_rows, share, rest,
            features + second * D, d_features + second * D, item_dot, item_lengths, d_u_item,
            None, 0, B, D, RAW, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    else:
        if TEXTS:
            _d_new_features(
                d_features, features, text, text_stride, u_text, d_u_text, lengths, d_text,
                d_blend, rows, in_rows, share, rest, None, None, None, None, None,
                d_squares, square_tiles, C, D, False, BLOCK_M, BLOCK_D,
            )  # fmt: skip

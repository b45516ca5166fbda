"""The cosine of an image and a text blended with u^, from products of unit vectors."""

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(1e-24)  # of the square of a length that divides


@triton.jit
def scalar(pointer, value):
    """A number, or a tensor of one element."""
    if pointer is not None:
        return tl.load(pointer).to(tl.float32)
    return value


@triton.jit
def portions(blend, value, rest_value):
    """blend and 1 - blend; of a number the host has taken the latter, rounded once."""
    if blend is not None:
        share = tl.load(blend).to(tl.float32)
        return share, 1.0 - share
    return value, rest_value


@triton.jit
def squared_unit(lengths, rows, in_rows, stride):
    """The square of a unit row, of the row's length before: 1, or less where it was floored."""
    length = tl.load(lengths + rows * stride, mask=in_rows, other=1.0)
    unit = tl.minimum(length * 1e12, 1.0)
    return unit * unit


@triton.jit
def inverse_length(square):
    """1 / |u| and the square of the unit vector: 1, or less where the length was floored."""
    inverse = tl.rsqrt(tl.maximum(square, FLOOR))
    return inverse, tl.where(square >= FLOOR, 1.0, square * inverse * inverse)


@triton.jit
def blended(text_dot, image_dot, similarity, text_square, new_square, blend, rest):
    """p.i and |p|^2 of p = blend u^ + rest t, where rest is 1 - blend.

    text_dot is t.u^, image_dot i.u^, similarity t.i; the squares are those of t and u^.
    """
    square = blend * blend * new_square + rest * rest * text_square
    square += 2.0 * blend * rest * text_dot
    return blend * image_dot + rest * similarity, square


@triton.jit
def logit(along, square, scale):
    return scale * along * tl.rsqrt(tl.maximum(square, FLOOR))


@triton.jit
def d_blended(d, along, square, scale):
    """What p.i, |p|^2 and the scale get from a logit's gradient."""
    rescale = tl.rsqrt(tl.maximum(square, FLOOR))
    d_along = scale * rescale * d
    d_square = tl.where(square >= FLOOR, -0.5 * d_along * along * rescale * rescale, 0.0)
    return d_along, d_square, d * along * rescale


@triton.jit
def d_share(
    d_along, d_square, text_dot, image_dot, similarity, text_square, new_square, blend, rest
):
    """What the blend gets from the gradients of p.i and |p|^2."""
    of_square = 2.0 * blend * new_square - 2.0 * rest * text_square
    of_square += 2.0 * (rest - blend) * text_dot
    return (image_dot - similarity) * d_along + of_square * d_square

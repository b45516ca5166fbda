"""Texts that see all texts and the image: what is computed for each pair of text and image.

u = W e + b, e = act(z), is never formed where it need not be: |u|^2 = e.(G e + 2 g) + b.b with
G = W^T W and g = W^T b. That loses u where W e nearly cancels b, or itself, so the pairs of a tile
where one's |u|^2 is small beside its terms take it from u.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..activations import activate
from ..products import multiply, plus
from .attention import load_head, shares
from .blend import FLOOR, blended, logit, scalar, squared_unit

SMALL = tl.constexpr(0.0625)


@triton.jit
def own_odds(
    qkv,
    lse,
    texts,
    in_texts,
    items,
    in_items,
    head,
    shift,
    scale,
    C,
    H,
    head_dim,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Log-odds of the image against all texts in what a text's head attends to."""
    E = H * head_dim
    units = tl.arange(0, BLOCK_H)
    of_head = qkv + head * head_dim
    q = load_head(of_head, texts, in_texts, 3 * E, units, head_dim) * scale
    k = load_head(of_head + E, items + C, in_items, 3 * E, units, head_dim)
    log_sum = tl.load(lse + texts * H + head, mask=in_texts, other=0.0)
    return tl.dot(q, tl.trans(k), input_precision=PRECISION) + (shift - log_sum)[:, None]


@triton.jit
def load_units(base, rows, in_rows, stride, units, R):
    return tl.load(
        base + (rows * stride)[:, None] + units[None, :],
        mask=in_rows[:, None] & (units < R)[None, :],
        other=0.0,
    )


@triton.jit
def hidden_vectors(
    qkv,
    lse,
    hidden,
    texts,
    in_texts,
    items,
    in_items,
    shift,
    scale,
    C,
    H,
    head_dim,
    R,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """z [BLOCK_C, BLOCK_B, BLOCK_R], mixed head by head of what text and image give."""
    units = tl.arange(0, BLOCK_R)
    z = tl.zeros([BLOCK_C, BLOCK_B, BLOCK_R], tl.float32)
    for head in range(0, H):
        odds = own_odds(
            qkv, lse, texts, in_texts, items, in_items, head, shift, scale, C, H, head_dim,
            PRECISION, BLOCK_H,
        )  # fmt: skip
        of_image, of_text = shares(odds)
        from_text = load_units(hidden + head * R, texts, in_texts, H * R, units, R)
        from_image = load_units(hidden + head * R, items + C, in_items, H * R, units, R)
        z += of_text[:, :, None] * from_text[:, None, :]
        z += of_image[:, :, None] * from_image[None, :, :]
    return z


@triton.jit
def quadratic(
    e,
    gram,
    last_weight,
    last_bias,
    inside,
    D,
    R,
    GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """|u|^2 of each pair [BLOCK_C, BLOCK_B], and half its gradient by e."""
    units = tl.arange(0, BLOCK_R)
    in_units = units < R
    flat = tl.reshape(e, [BLOCK_C * BLOCK_B, BLOCK_R])
    matrix = tl.load(
        gram + (units * R)[:, None] + units[None, :],
        mask=in_units[:, None] & in_units[None, :],
        other=0.0,
    )
    linear = tl.load(gram + R * R + units, mask=in_units, other=0.0)
    diagonal = tl.load(gram + units * (R + 1), mask=in_units, other=0.0)
    constant = tl.load(gram + R * R + R)
    half = tl.dot(flat, matrix, input_precision=PRECISION) + linear[None, :]
    half = tl.reshape(half, [BLOCK_C, BLOCK_B, BLOCK_R])
    square = tl.sum(e * (half + linear[None, None, :]), 2) + constant
    terms = tl.sum(e * e * diagonal[None, None, :], 2) + constant
    cancels = (square < terms * SMALL) & inside
    if tl.max(tl.max(cancels.to(tl.int32), 1), 0) > 0:
        squares = tl.zeros([BLOCK_C * BLOCK_B], tl.float32)
        flat_half = tl.zeros([BLOCK_C * BLOCK_B, BLOCK_R], tl.float32)
        for start in range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            in_cols = cols < D
            w = tl.load(
                last_weight + (cols.to(tl.int64) * R)[:, None] + units[None, :],
                mask=in_cols[:, None] & in_units[None, :],
                other=0.0,
            ).to(tl.float32)
            b = tl.load(last_bias + cols, mask=in_cols, other=0.0).to(tl.float32)
            u = tl.dot(flat, tl.trans(w), input_precision=PRECISION) + b[None, :]
            squares += tl.sum(u * u, 1)
            if GRADIENT:
                flat_half = plus(flat_half, tl.dot(u, w, input_precision=PRECISION))
        square = tl.reshape(squares, [BLOCK_C, BLOCK_B])
        if GRADIENT:
            half = tl.reshape(flat_half, [BLOCK_C, BLOCK_B, BLOCK_R])
    return square, half


@triton.jit
def inverse_length(square):
    """1 / |u| and the square of the unit vector: 1, or less where the length was floored."""
    inverse = tl.rsqrt(tl.maximum(square, FLOOR))
    return inverse, tl.where(square >= FLOOR, 1.0, square * inverse * inverse)


@triton.jit(do_not_specialize=["C", "B"])
def pairs_kernel(
    logits,
    similarity,
    features,
    qkv,
    lse,
    hidden,
    products,
    constants,
    lengths,
    gram,
    last_weight,
    last_bias,
    blend,
    blend_value,
    logit_scale,
    scale_value,
    shift,
    scale,
    C,
    B,
    D,
    H,
    head_dim,
    R,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """logits [B, C], and similarity [C, B] of unit texts and images where it is kept."""
    texts = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    items = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    in_texts = texts < C
    in_items = items < B
    inside = in_texts[:, None] & in_items[None, :]
    alike = tl.zeros([BLOCK_C, BLOCK_B], tl.float32)
    alike = multiply(
        alike, features, texts * D, in_texts, 1, features, (items + C) * D, in_items, 1, D,
        PRECISION, BLOCK_K,
    )  # fmt: skip
    if similarity is not None:
        tl.store(similarity + (texts * B)[:, None] + items[None, :], alike, mask=inside)
    z = hidden_vectors(
        qkv, lse, hidden, texts, in_texts, items, in_items, shift, scale, C, H, head_dim, R,
        PRECISION, BLOCK_C, BLOCK_B, BLOCK_R, BLOCK_H,
    )  # fmt: skip
    e = activate(z, ACTIVATION)
    square, _ = quadratic(
        e, gram, last_weight, last_bias, inside, D, R,
        False, PRECISION, BLOCK_C, BLOCK_B, BLOCK_R, BLOCK_D,
    )  # fmt: skip
    units = tl.arange(0, BLOCK_R)
    of_text = load_units(products, texts, in_texts, R, units, R)
    of_image = load_units(products, items + C, in_items, R, units, R)
    text_dot = tl.sum(e * of_text[:, None, :], 2)
    text_dot += tl.load(constants + texts, mask=in_texts, other=0.0)[:, None]
    image_dot = tl.sum(e * of_image[None, :, :], 2)
    image_dot += tl.load(constants + items + C, mask=in_items, other=0.0)[None, :]
    inverse, unit = inverse_length(square)
    along, mixed = blended(
        text_dot * inverse, image_dot * inverse, alike,
        squared_unit(lengths, texts, in_texts, 3)[:, None], unit, scalar(blend, blend_value),
    )  # fmt: skip
    result = logit(along, mixed, scalar(logit_scale, scale_value))
    place = logits + (items * C)[None, :] + texts[:, None]
    tl.store(place, result.to(logits.dtype.element_ty), mask=inside)

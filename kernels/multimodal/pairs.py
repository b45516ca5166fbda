"""Texts that see all texts and the image: what is computed for each pair of text and image.

u = W e + b, e = act(z), is never formed where it need not be: |u|^2 = e.(G e + 2 g) + b.b with
G = W^T W and g = W^T b. That loses u where W e nearly cancels b, or itself, so the pairs of a tile
where one's |u|^2 is small beside its terms take it from u.

A product of tiles wants its factors in registers, BLOCK_K units of e at a time: where that is not
all of them, they are computed again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..activations import activate
from ..products import multiply, plus
from ..rows import sum_of_products
from .attention import load_head, shares
from .blend import blended, inverse_length, logit, portions, scalar, squared_unit

SMALL = tl.constexpr(0.0625)


@triton.jit(do_not_specialize=["C", "B"])
def products_kernel(
    similarity,
    odds,
    features,
    qkv,
    lse,
    shift,
    scale,
    C,
    B,
    D,
    H,
    head_dim,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of texts with images [C, B]: the products of unit features, and (program 2) for each head the
    log-odds of the image against all texts in what the text attends to [H, C, B]."""
    texts = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    items = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    in_texts = texts < C
    in_items = items < B
    inside = in_texts[:, None] & in_items[None, :]
    place = (texts * B)[:, None] + items[None, :]
    head = tl.program_id(2)
    if head == H:
        tile = tl.zeros([BLOCK_C, BLOCK_B], tl.float32)
        tile = multiply(
            tile, features, texts * D, in_texts, 1, features, (items + C) * D, in_items, 1, D,
            PRECISION, BLOCK_K,
        )  # fmt: skip
        tl.store(similarity + place, tile, mask=inside)
    else:
        E = H * head_dim
        units = tl.arange(0, BLOCK_H)
        of_head = qkv + head * head_dim
        q = load_head(of_head, texts, in_texts, 3 * E, units, head_dim) * scale
        k = load_head(of_head + E, items + C, in_items, 3 * E, units, head_dim)
        log_sum = tl.load(lse + texts * H + head, mask=in_texts, other=0.0)
        tile = tl.dot(q, tl.trans(k), input_precision=PRECISION) + (shift - log_sum)[:, None]
        tl.store(odds + head.to(tl.int64) * C * B + place, tile, mask=inside)


@triton.jit
def load_units(base, rows, in_rows, stride, units, R):
    return tl.load(
        base + (rows * stride)[:, None] + units[None, :],
        mask=in_rows[:, None] & (units < R)[None, :],
        other=0.0,
    )


@triton.jit
def head_shares(odds, head, texts, items, inside, C, B):
    """An image's and the texts' share in what a text's head attends to."""
    place = tl.cast(head, tl.int64) * C * B + (texts * B)[:, None] + items[None, :]
    return shares(tl.load(odds + place, mask=inside, other=0.0))


@triton.jit
def hidden_vectors(odds, hidden, texts, in_texts, items, in_items, units, C, B, H, R):
    """z [texts, items, units], mixed head by head of what text and image give."""
    inside = in_texts[:, None] & in_items[None, :]
    z = tl.zeros([texts.shape[0], items.shape[0], units.shape[0]], tl.float32)
    for head in range(0, H):
        of_image, of_text = head_shares(odds, head, texts, items, inside, C, B)
        from_text = load_units(hidden + head * R, texts, in_texts, H * R, units, R)
        from_image = load_units(hidden + head * R, items + C, in_items, H * R, units, R)
        z += of_text[:, :, None] * from_text[:, None, :]
        z += of_image[:, :, None] * from_image[None, :, :]
    return z


@triton.jit
def some_units(
    e,
    first,
    odds,
    hidden,
    texts,
    in_texts,
    items,
    in_items,
    C,
    B,
    H,
    R,
    ACTIVATION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The units of e [BLOCK_C, BLOCK_B, BLOCK_R] from ``first`` on, BLOCK_K of them."""
    if e.shape[2] == BLOCK_K:
        return e
    units = first + tl.arange(0, BLOCK_K)
    z = hidden_vectors(odds, hidden, texts, in_texts, items, in_items, units, C, B, H, R)
    return activate(z, ACTIVATION)


@triton.jit
def half_gradient(
    e,
    gram,
    odds,
    hidden,
    texts,
    in_texts,
    items,
    in_items,
    C,
    B,
    H,
    R,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Half the gradient of |u|^2 by e, G e + g, and g."""
    pairs: tl.constexpr = e.shape[0] * e.shape[1]
    units = tl.arange(0, e.shape[2])
    linear = tl.load(gram + R * R + units, mask=units < R, other=0.0)
    half = tl.zeros([pairs, e.shape[2]], tl.float32) + linear[None, :]
    for first in range(0, R, BLOCK_K):
        part = some_units(
            e, first, odds, hidden, texts, in_texts, items, in_items, C, B, H, R,
            ACTIVATION, BLOCK_K,
        )  # fmt: skip
        steps = first + tl.arange(0, BLOCK_K)
        matrix = tl.load(
            gram + (steps * R)[:, None] + units[None, :],
            mask=(steps < R)[:, None] & (units < R)[None, :],
            other=0.0,
        )
        part = tl.reshape(part, [pairs, BLOCK_K])
        half = plus(half, tl.dot(part, matrix, input_precision=PRECISION))
    return tl.reshape(half, e.shape), linear


@triton.jit
def direct_square(
    e,
    last_weight,
    last_bias,
    odds,
    hidden,
    texts,
    in_texts,
    items,
    in_items,
    C,
    B,
    D,
    H,
    R,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """|u|^2 of each pair, from u."""
    pairs: tl.constexpr = e.shape[0] * e.shape[1]
    squares = tl.zeros([pairs], tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        in_cols = cols < D
        b = tl.load(last_bias + cols, mask=in_cols, other=0.0).to(tl.float32)
        u = tl.zeros([pairs, BLOCK_D], tl.float32) + b[None, :]
        for first in range(0, R, BLOCK_K):
            part = some_units(
                e, first, odds, hidden, texts, in_texts, items, in_items, C, B, H, R,
                ACTIVATION, BLOCK_K,
            )  # fmt: skip
            steps = first + tl.arange(0, BLOCK_K)
            w = tl.load(
                last_weight + steps[:, None] + (cols.to(tl.int64) * R)[None, :],
                mask=(steps < R)[:, None] & in_cols[None, :],
                other=0.0,
            ).to(tl.float32)
            part = tl.reshape(part, [pairs, BLOCK_K])
            u = plus(u, tl.dot(part, w, input_precision=PRECISION))
        squares += sum_of_products(u, u, 1)
    return tl.reshape(squares, [e.shape[0], e.shape[1]])


@triton.jit(do_not_specialize=["C", "B"])
def pairs_kernel(
    logits,
    squares,
    text_dots,
    image_dots,
    constants,
    last_weight,
    last_bias,
    similarity,
    odds,
    hidden,
    products,
    lengths,
    gram,
    blend,
    blend_value,
    rest_value,
    logit_scale,
    scale_value,
    C,
    B,
    H,
    R,
    D,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """logits [B, C], and where they are kept |u|^2, t.u and i.u, each [C, B]."""
    texts = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    items = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    in_texts = texts < C
    in_items = items < B
    inside = in_texts[:, None] & in_items[None, :]
    place = (texts * B)[:, None] + items[None, :]
    units = tl.arange(0, BLOCK_R)
    z = hidden_vectors(odds, hidden, texts, in_texts, items, in_items, units, C, B, H, R)
    e = activate(z, ACTIVATION)
    of_text = load_units(products, texts, in_texts, R, units, R)
    text_dot = sum_of_products(e, of_text[:, None, :], 2)
    text_dot += tl.load(constants + texts, mask=in_texts, other=0.0)[:, None]
    of_image = load_units(products, items + C, in_items, R, units, R)
    image_dot = sum_of_products(e, of_image[None, :, :], 2)
    image_dot += tl.load(constants + items + C, mask=in_items, other=0.0)[None, :]

    half, linear = half_gradient(
        e, gram, odds, hidden, texts, in_texts, items, in_items, C, B, H, R,
        ACTIVATION, PRECISION, BLOCK_K,
    )  # fmt: skip
    constant = tl.load(gram + R * R + R)
    square = sum_of_products(e, half + linear[None, None, :], 2) + constant
    diagonal = tl.load(gram + units * (R + 1), mask=units < R, other=0.0)
    terms = sum_of_products(e * e, diagonal[None, None, :], 2) + constant
    cancels = (square < terms * SMALL) & inside
    if tl.max(tl.max(cancels.to(tl.int32), 1), 0) > 0:
        square = direct_square(
            e, last_weight, last_bias, odds, hidden, texts, in_texts, items, in_items,
            C, B, D, H, R, ACTIVATION, PRECISION, BLOCK_D, BLOCK_K,
        )  # fmt: skip
    if squares is not None:
        tl.store(squares + place, square, mask=inside)
        tl.store(text_dots + place, text_dot, mask=inside)
        tl.store(image_dots + place, image_dot, mask=inside)
    inverse, unit = inverse_length(square)
    share, rest = portions(blend, blend_value, rest_value)
    along, mixed = blended(
        text_dot * inverse,
        image_dot * inverse,
        tl.load(similarity + place, mask=inside, other=0.0),
        squared_unit(lengths, texts, in_texts, 3)[:, None],
        unit,
        share,
        rest,
    )
    result = logit(along, mixed, scalar(logit_scale, scale_value))
    target = logits + (items * C)[None, :] + texts[:, None]
    tl.store(target, result.to(logits.dtype.element_ty), mask=inside)

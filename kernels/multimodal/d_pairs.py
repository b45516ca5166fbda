"""Backward of what is computed for each pair: everything again, and the sums of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

from ..activations import activate, activation_backward
from .attention import shares
from .blend import FLOOR, blended, d_blended, d_share, scalar, squared_unit
from .pairs import hidden_vectors, inverse_length, load_units, own_odds, quadratic


@triton.jit(do_not_specialize=["C", "B"])
def d_pairs_kernel(
    d_logits,
    similarity,
    d_similarity,
    d_odds,
    of_texts,
    of_images,
    of_weights,
    of_scalars,
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
    width,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """d_similarity [C, B], d_odds [H, C, B], and the tile's sums of everything else.

    of_texts [tiles of B, C, width] holds the gradients of hidden (H R), products (R) and constants
    (1), of_images [tiles of C, B, width] alike; of_weights [tiles, R R + R + 1] those of gram;
    of_scalars [tiles, 2] those of scale and blend.
    """
    texts = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    items = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    in_texts = texts < C
    in_items = items < B
    inside = in_texts[:, None] & in_items[None, :]
    units = tl.arange(0, BLOCK_R)
    in_units = units < R
    place = (texts * B)[:, None] + items[None, :]
    z = hidden_vectors(
        qkv, lse, hidden, texts, in_texts, items, in_items, shift, scale, C, H, head_dim, R,
        PRECISION, BLOCK_C, BLOCK_B, BLOCK_R, BLOCK_H,
    )  # fmt: skip
    e = activate(z, ACTIVATION)
    square, half = quadratic(
        e, gram, last_weight, last_bias, inside, D, R,
        True, PRECISION, BLOCK_C, BLOCK_B, BLOCK_R, BLOCK_D,
    )  # fmt: skip
    of_text = load_units(products, texts, in_texts, R, units, R)
    of_image = load_units(products, items + C, in_items, R, units, R)
    text_dot = tl.sum(e * of_text[:, None, :], 2)
    text_dot += tl.load(constants + texts, mask=in_texts, other=0.0)[:, None]
    image_dot = tl.sum(e * of_image[None, :, :], 2)
    image_dot += tl.load(constants + items + C, mask=in_items, other=0.0)[None, :]
    alike = tl.load(similarity + place, mask=inside, other=0.0)
    share = scalar(blend, blend_value)
    text_square = squared_unit(lengths, texts, in_texts, 3)[:, None]
    inverse, unit = inverse_length(square)
    text_dot *= inverse
    image_dot *= inverse
    along, mixed = blended(text_dot, image_dot, alike, text_square, unit, share)
    d = tl.load(d_logits + (items * C)[None, :] + texts[:, None], mask=inside, other=0.0)
    d_along, d_mixed, d_scale = d_blended(
        d.to(tl.float32), along, mixed, scalar(logit_scale, scale_value)
    )
    d_blend = d_share(d_along, d_mixed, text_dot, image_dot, alike, text_square, unit, share)
    tile = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(of_scalars + tile * 2, tl.sum(tl.sum(d_scale, 1), 0))
    tl.store(of_scalars + tile * 2 + 1, tl.sum(tl.sum(d_blend, 1), 0))
    tl.store(d_similarity + place, (1.0 - share) * d_along, mask=inside)
    d_text_dot = 2.0 * share * (1.0 - share) * inverse * d_mixed
    d_image_dot = share * inverse * d_along
    # Through |u^|^2 nothing comes that does not cancel, unless the length was floored.
    d_square = tl.where(
        square >= FLOOR,
        -0.5 * inverse * (image_dot * d_image_dot + text_dot * d_text_dot),
        share * share * inverse * inverse * d_mixed,
    )
    d_e = 2.0 * d_square[:, :, None] * half
    d_e += d_text_dot[:, :, None] * of_text[:, None, :]
    d_e += d_image_dot[:, :, None] * of_image[None, :, :]
    d_z = activation_backward(d_e, z, ACTIVATION)

    text_row = of_texts + (tl.program_id(1) * C.to(tl.int64) + texts) * width
    image_row = of_images + (tl.program_id(0) * B.to(tl.int64) + items) * width
    text_units = in_texts[:, None] & in_units[None, :]
    image_units = in_items[:, None] & in_units[None, :]
    weighted = d_text_dot[:, :, None] * e
    tl.store(text_row[:, None] + (H * R + units)[None, :], tl.sum(weighted, 1), mask=text_units)
    tl.store(text_row + (H + 1) * R, tl.sum(d_text_dot, 1), mask=in_texts)
    weighted = d_image_dot[:, :, None] * e
    tl.store(image_row[:, None] + (H * R + units)[None, :], tl.sum(weighted, 0), mask=image_units)
    tl.store(image_row + (H + 1) * R, tl.sum(d_image_dot, 0), mask=in_items)

    weights = of_weights + tile * (R * R + R + 1)
    flat = tl.reshape(e, [BLOCK_C * BLOCK_B, BLOCK_R])
    weighted = tl.reshape(d_square[:, :, None] * e, [BLOCK_C * BLOCK_B, BLOCK_R])
    d_gram = tl.dot(tl.trans(weighted), flat, input_precision=PRECISION)
    tl.store(
        weights + (units * R)[:, None] + units[None, :],
        d_gram,
        mask=in_units[:, None] & in_units[None, :],
    )
    tl.store(weights + R * R + units, 2.0 * tl.sum(weighted, 0), mask=in_units)
    tl.store(weights + R * R + R, tl.sum(tl.sum(d_square, 1), 0))

    for head in range(0, H):
        odds = own_odds(
            qkv, lse, texts, in_texts, items, in_items, head, shift, scale, C, H, head_dim,
            PRECISION, BLOCK_H,
        )  # fmt: skip
        image_share, text_share = shares(odds)
        from_text = load_units(hidden + head * R, texts, in_texts, H * R, units, R)
        from_image = load_units(hidden + head * R, items + C, in_items, H * R, units, R)
        d_own = tl.sum(d_z * (from_image[None, :, :] - from_text[:, None, :]), 2)
        d_own *= image_share * text_share
        tl.store(d_odds + tl.cast(head, tl.int64) * C * B + place, d_own, mask=inside)
        of_head = (head * R + units)[None, :]
        part = tl.sum(text_share[:, :, None] * d_z, 1)
        tl.store(text_row[:, None] + of_head, part, mask=text_units)
        part = tl.sum(image_share[:, :, None] * d_z, 0)
        tl.store(image_row[:, None] + of_head, part, mask=image_units)

"""Backward of what is computed for each pair: everything again, and the sums of tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from ..activations import activate, activation_backward
from .blend import FLOOR, blended, d_blended, d_share, scalar, squared_unit
from .pairs import (
    half_gradient,
    head_shares,
    hidden_vectors,
    inverse_length,
    load_units,
    some_units,
)

GROUP = tl.constexpr(32)  # pairs whose products are one chain of sums


@triton.jit
def _add(pointer, value, mask, later):
    """To what is there, if this is ``later`` than the first."""
    value += tl.load(pointer, mask=mask & later, other=0.0)
    tl.store(pointer, value, mask=mask)


@triton.jit(do_not_specialize=["C", "B", "tiles"])
def d_pairs_kernel(
    d_logits,
    squares,
    text_dots,
    image_dots,
    d_similarity,
    d_odds,
    of_texts,
    of_images,
    of_weights,
    of_scalars,
    similarity,
    odds,
    hidden,
    products,
    lengths,
    gram,
    blend,
    blend_value,
    logit_scale,
    scale_value,
    C,
    B,
    H,
    R,
    width,
    tiles,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """d_similarity [C, B], d_odds [H, C, B], and sums of everything else.

    A program owns the images of a tile and the texts of ``tiles`` tiles. of_texts [tiles of B, C,
    width] holds the gradients of hidden (H R), products (R) and constants (1), of_images [programs
    0, B, width] alike; of_weights [programs, R R + R + 1] those of gram; of_scalars [programs, 2]
    those of scale and blend.
    """
    items = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    in_items = items < B
    units = tl.arange(0, BLOCK_R)
    in_units = units < R
    pairs: tl.constexpr = BLOCK_C * BLOCK_B
    share = scalar(blend, blend_value)
    factor = scalar(logit_scale, scale_value)
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    weights = of_weights + program * (R * R + R + 1)
    image_row = of_images + (tl.program_id(0) * B.to(tl.int64) + items) * width
    image_units = in_items[:, None] & in_units[None, :]
    d_scale_sum = tl.zeros([BLOCK_C, BLOCK_B], tl.float32)
    d_blend_sum = tl.zeros([BLOCK_C, BLOCK_B], tl.float32)
    d_constant = tl.zeros([BLOCK_C, BLOCK_B], tl.float32)
    for tile in range(0, tiles):
        later = tile > 0
        texts = (tl.program_id(0) * tiles + tile) * BLOCK_C + tl.arange(0, BLOCK_C)
        texts = texts.to(tl.int64)
        in_texts = texts < C
        inside = in_texts[:, None] & in_items[None, :]
        place = (texts * B)[:, None] + items[None, :]
        alike = tl.load(similarity + place, mask=inside, other=0.0)
        square = tl.load(squares + place, mask=inside, other=1.0)
        inverse, unit = inverse_length(square)
        text_dot = tl.load(text_dots + place, mask=inside, other=0.0) * inverse
        image_dot = tl.load(image_dots + place, mask=inside, other=0.0) * inverse
        text_square = squared_unit(lengths, texts, in_texts, 3)[:, None]
        along, mixed = blended(text_dot, image_dot, alike, text_square, unit, share)
        d = tl.load(d_logits + (items * C)[None, :] + texts[:, None], mask=inside, other=0.0)
        d_along, d_mixed, d_scale = d_blended(d.to(tl.float32), along, mixed, factor)
        d_scale_sum += d_scale
        d_blend_sum += d_share(
            d_along, d_mixed, text_dot, image_dot, alike, text_square, unit, share
        )
        tl.store(d_similarity + place, (1.0 - share) * d_along, mask=inside)
        d_text_dot = 2.0 * share * (1.0 - share) * inverse * d_mixed
        d_image_dot = share * inverse * d_along
        # Through |u^|^2 nothing comes that does not cancel, unless the length was floored.
        d_square = tl.where(
            square >= FLOOR,
            -0.5 * inverse * (image_dot * d_image_dot + text_dot * d_text_dot),
            share * share * inverse * inverse * d_mixed,
        )
        d_constant += d_square

        z = hidden_vectors(odds, hidden, texts, in_texts, items, in_items, units, C, B, H, R)
        e = activate(z, ACTIVATION)
        text_row = of_texts + (tl.program_id(1) * C.to(tl.int64) + texts) * width
        text_units = in_texts[:, None] & in_units[None, :]
        of_products = (H * R + units)[None, :]
        part = tl.sum(d_text_dot[:, :, None] * e, 1)
        tl.store(text_row[:, None] + of_products, part, mask=text_units)
        tl.store(text_row + (H + 1) * R, tl.sum(d_text_dot, 1), mask=in_texts)
        part = tl.sum(d_image_dot[:, :, None] * e, 0)
        _add(image_row[:, None] + of_products, part, image_units, later)
        _add(image_row + (H + 1) * R, tl.sum(d_image_dot, 0), in_items, later)
        weighted = d_square[:, :, None] * e
        _add(weights + R * R + units, 2.0 * tl.sum(tl.sum(weighted, 0), 0), in_units, later)
        weighted = tl.reshape(weighted, [pairs // GROUP, GROUP, BLOCK_R])
        weighted = tl.permute(weighted, (0, 2, 1))
        for first in range(0, R, BLOCK_K):
            some = some_units(
                e, first, odds, hidden, texts, in_texts, items, in_items, C, B, H, R,
                ACTIVATION, BLOCK_K,
            )  # fmt: skip
            some = tl.reshape(some, [pairs // GROUP, GROUP, BLOCK_K])
            d_gram = tl.sum(tl.dot(weighted, some, input_precision=PRECISION), 0)
            steps = first + tl.arange(0, BLOCK_K)
            whole = in_units[:, None] & (steps < R)[None, :]
            _add(weights + (units * R)[:, None] + steps[None, :], d_gram, whole, later)

        half, _ = half_gradient(
            e, gram, odds, hidden, texts, in_texts, items, in_items, C, B, H, R,
            ACTIVATION, PRECISION, BLOCK_K,
        )  # fmt: skip
        d_e = 2.0 * d_square[:, :, None] * half
        of_text = load_units(products, texts, in_texts, R, units, R)
        d_e += d_text_dot[:, :, None] * of_text[:, None, :]
        of_image = load_units(products, items + C, in_items, R, units, R)
        d_e += d_image_dot[:, :, None] * of_image[None, :, :]
        d_z = activation_backward(d_e, z, ACTIVATION)
        for head in range(0, H):
            image_share, text_share = head_shares(odds, head, texts, items, inside, C, B)
            from_text = load_units(hidden + head * R, texts, in_texts, H * R, units, R)
            from_image = load_units(hidden + head * R, items + C, in_items, H * R, units, R)
            d_own = tl.sum(d_z * (from_image[None, :, :] - from_text[:, None, :]), 2)
            d_own *= image_share * text_share
            tl.store(d_odds + tl.cast(head, tl.int64) * C * B + place, d_own, mask=inside)
            of_head = (head * R + units)[None, :]
            part = tl.sum(text_share[:, :, None] * d_z, 1)
            tl.store(text_row[:, None] + of_head, part, mask=text_units)
            part = tl.sum(image_share[:, :, None] * d_z, 0)
            _add(image_row[:, None] + of_head, part, image_units, later)
        tl.debug_barrier()  # what a thread has stored another may load next
    tl.store(of_scalars + program * 2, tl.sum(tl.sum(d_scale_sum, 1), 0))
    tl.store(of_scalars + program * 2 + 1, tl.sum(tl.sum(d_blend_sum, 1), 0))
    tl.store(weights + R * R + R, tl.sum(tl.sum(d_constant, 1), 0))

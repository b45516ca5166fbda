"""Backward of what is computed for each pair: everything again, and the sums of tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from ..activations import activate, activation_backward
from ..rows import sum_of_products
from .pairs import half_gradient, head_shares, hidden_vectors, load_units, some_units

GROUP = tl.constexpr(16)  # pairs whose products are one chain of sums


@triton.jit
def _add(pointer, value, mask, later):
    """To what is there, if this is ``later`` than the first."""
    value += tl.load(pointer, mask=mask & later, other=0.0)
    tl.store(pointer, value, mask=mask)


@triton.jit(do_not_specialize=["C", "B", "tiles"])
def d_pairs_kernel(
    d_squares,
    d_text_dots,
    d_image_dots,
    d_odds,
    of_texts,
    of_images,
    of_weights,
    odds,
    hidden,
    products,
    gram,
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
    """d_odds [H, C, B], and the gradients of what else goes into |u|^2, t.u and i.u.

    A program owns the images of a tile and the texts of ``tiles`` tiles. of_texts [tiles of B, C,
    width] holds the gradients of hidden (H R), products (R) and constants (1), of_images [programs
    0, B, width] alike; of_weights [programs, R R + R + 1] those of gram.
    """
    items = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    in_items = items < B
    units = tl.arange(0, BLOCK_R)
    in_units = units < R
    pairs: tl.constexpr = BLOCK_C * BLOCK_B
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    weights = of_weights + program * (R * R + R + 1)
    image_row = of_images + (tl.program_id(0) * B.to(tl.int64) + items) * width
    image_units = in_items[:, None] & in_units[None, :]
    d_constant = tl.zeros([BLOCK_C, BLOCK_B], tl.float32)
    for tile in range(0, tiles):
        later = tile > 0
        texts = (tl.program_id(0) * tiles + tile) * BLOCK_C + tl.arange(0, BLOCK_C)
        texts = texts.to(tl.int64)
        in_texts = texts < C
        inside = in_texts[:, None] & in_items[None, :]
        place = (texts * B)[:, None] + items[None, :]
        d_square = tl.load(d_squares + place, mask=inside, other=0.0)
        d_text_dot = tl.load(d_text_dots + place, mask=inside, other=0.0)
        d_image_dot = tl.load(d_image_dots + place, mask=inside, other=0.0)
        d_constant += d_square
        z = hidden_vectors(odds, hidden, texts, in_texts, items, in_items, units, C, B, H, R)
        e = activate(z, ACTIVATION)
        text_row = of_texts + (tl.program_id(1) * C.to(tl.int64) + texts) * width
        text_units = in_texts[:, None] & in_units[None, :]
        of_products = (H * R + units)[None, :]
        part = sum_of_products(e, d_text_dot[:, :, None], 1)
        tl.store(text_row[:, None] + of_products, part, mask=text_units)
        tl.store(text_row + (H + 1) * R, tl.sum(d_text_dot, 1), mask=in_texts)
        part = sum_of_products(e, d_image_dot[:, :, None], 0)
        _add(image_row[:, None] + of_products, part, image_units, later)
        _add(image_row + (H + 1) * R, tl.sum(d_image_dot, 0), in_items, later)
        d_linear = 2.0 * tl.sum(sum_of_products(e, d_square[:, :, None], 0), 0)
        _add(weights + R * R + units, d_linear, in_units, later)
        factors = tl.reshape(d_square, [pairs // GROUP, GROUP])
        weighted = tl.reshape(e, [pairs // GROUP, GROUP, BLOCK_R]) * factors[:, :, None]
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
            d_own = sum_of_products(d_z, from_image[None, :, :] - from_text[:, None, :], 2)
            d_own *= image_share * text_share
            tl.store(d_odds + tl.cast(head, tl.int64) * C * B + place, d_own, mask=inside)
            of_head = (head * R + units)[None, :]
            part = sum_of_products(d_z, text_share[:, :, None], 1)
            tl.store(text_row[:, None] + of_head, part, mask=text_units)
            part = sum_of_products(d_z, image_share[:, :, None], 0)
            _add(image_row[:, None] + of_head, part, image_units, later)
        tl.debug_barrier()  # what a thread has stored another may load next
    tl.store(weights + R * R + R, tl.sum(tl.sum(d_constant, 1), 0))

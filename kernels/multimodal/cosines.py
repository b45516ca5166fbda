"""Logits from products of unit rows, where no text sees both texts and image; and the way back.

The first steps back are the same for texts that see both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..products import multiply
from .blend import (
    FLOOR,
    blended,
    d_blended,
    d_share,
    inverse_length,
    logit,
    portions,
    scalar,
    squared_unit,
)


@triton.jit(do_not_specialize=["C", "B"])
def cosines_kernel(
    logits,
    similarity,
    features,
    item_dot,
    item_lengths,
    lengths,
    blend,
    blend_value,
    rest_value,
    logit_scale,
    scale_value,
    C,
    B,
    D,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """logits [B, C]; with item_dot texts are blended with what they become that see the image.

    similarity [C, B] or [C, 2 B], where it is kept: texts by images, and by the former.
    """
    texts = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    items = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    in_texts = texts < C
    in_items = items < B
    inside = in_texts[:, None] & in_items[None, :]
    factor = scalar(logit_scale, scale_value)
    share, rest = portions(blend, blend_value, rest_value)
    alike = tl.zeros([BLOCK_C, BLOCK_B], tl.float32)
    alike = multiply(
        alike, features, texts * D, in_texts, 1, features, (items + C) * D, in_items, 1, D,
        PRECISION, BLOCK_K,
    )  # fmt: skip
    if item_dot is not None:
        text_dot = tl.zeros([BLOCK_C, BLOCK_B], tl.float32)
        text_dot = multiply(
            text_dot, features, texts * D, in_texts, 1,
            features, (items + C + B) * D, in_items, 1, D, PRECISION, BLOCK_K,
        )  # fmt: skip
        if similarity is not None:
            row = similarity + (texts * 2 * B)[:, None] + items[None, :]
            tl.store(row, alike, mask=inside)
            tl.store(row + B, text_dot, mask=inside)
        along, square = blended(
            text_dot,
            tl.load(item_dot + items, mask=in_items, other=0.0)[None, :],
            alike,
            squared_unit(lengths, texts, in_texts, 3)[:, None],
            squared_unit(item_lengths, items, in_items, 1)[None, :],
            share,
            rest,
        )
        result = logit(along, square, factor)
    else:
        if similarity is not None:
            tl.store(similarity + (texts * B)[:, None] + items[None, :], alike, mask=inside)
        result = alike * factor
    place = logits + (items * C)[None, :] + texts[:, None]
    tl.store(place, result.to(logits.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["C", "B"])
def d_cosines_kernel(
    d_logits,
    similarity,
    squares,
    text_dots,
    image_dots,
    d_similarity,
    d_squares,
    d_text_dots,
    d_image_dots,
    of_texts,
    of_images,
    of_scalars,
    item_dot,
    item_lengths,
    lengths,
    blend,
    blend_value,
    rest_value,
    logit_scale,
    scale_value,
    C,
    B,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The gradients of what a logit is made of, and the tile's sums of others.

    Where there are squares, |u|^2 of each pair, d_similarity, d_squares, d_text_dots and
    d_image_dots are [C, B]. Where there is item_dot, d_similarity [C, 2 B] is of products with
    images and with what texts become that see the image, and of_images [tiles of C, B, 2] holds
    the gradients of item_dot and of the latters' squares. In either case of_texts [tiles of B, C]
    are those of the texts' squares. of_scalars [tiles, 2] are those of scale and blend.
    """
    texts = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    items = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    in_texts = texts < C
    in_items = items < B
    inside = in_texts[:, None] & in_items[None, :]
    tile = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    factor = scalar(logit_scale, scale_value)
    share, rest = portions(blend, blend_value, rest_value)
    d = tl.load(d_logits + (items * C)[None, :] + texts[:, None], mask=inside, other=0.0)
    d = d.to(tl.float32)
    width = B
    if item_dot is not None:
        width = 2 * B
    row = (texts * width)[:, None] + items[None, :]
    alike = tl.load(similarity + row, mask=inside, other=0.0)
    if squares is not None or item_dot is not None:
        text_square = squared_unit(lengths, texts, in_texts, 3)[:, None]
        if squares is not None:
            square = tl.load(squares + row, mask=inside, other=1.0)
            inverse, new_square = inverse_length(square)
            text_dot = tl.load(text_dots + row, mask=inside, other=0.0) * inverse
            image_dot = tl.load(image_dots + row, mask=inside, other=0.0) * inverse
        else:
            new_square = squared_unit(item_lengths, items, in_items, 1)[None, :]
            text_dot = tl.load(similarity + row + B, mask=inside, other=0.0)
            image_dot = tl.load(item_dot + items, mask=in_items, other=0.0)[None, :]
        along, mixed = blended(text_dot, image_dot, alike, text_square, new_square, share, rest)
        d_along, d_mixed, d_scale = d_blended(d, along, mixed, factor)
        d_blend = d_share(
            d_along, d_mixed, text_dot, image_dot, alike, text_square, new_square, share, rest
        )
        tl.store(d_similarity + row, rest * d_along, mask=inside)
        sums = of_texts + tl.program_id(1) * C.to(tl.int64) + texts
        d_square = rest * rest * tl.sum(d_mixed, 1)
        tl.store(sums, d_square, mask=in_texts)
        d_text_dot = 2.0 * share * rest * d_mixed
        d_image_dot = share * d_along
        d_new_square = share * share * d_mixed
        if squares is not None:
            tl.store(d_text_dots + row, d_text_dot * inverse, mask=inside)
            tl.store(d_image_dots + row, d_image_dot * inverse, mask=inside)
            # Through |u^|^2 nothing comes that does not cancel, unless the length was floored.
            through = -0.5 * (image_dot * d_image_dot + text_dot * d_text_dot)
            through = tl.where(square >= FLOOR, through, d_new_square) * inverse * inverse
            tl.store(d_squares + row, through, mask=inside)
        else:
            tl.store(d_similarity + row + B, d_text_dot, mask=inside)
            sums = of_images + (tl.program_id(0) * B.to(tl.int64) + items) * 2
            tl.store(sums, tl.sum(d_image_dot, 0), mask=in_items)
            tl.store(sums + 1, tl.sum(d_new_square, 0), mask=in_items)
        tl.store(of_scalars + tile * 2 + 1, tl.sum(tl.sum(d_blend, 1), 0))
    else:
        d_scale = d * alike
        tl.store(d_similarity + row, d * factor, mask=inside)
        tl.store(of_scalars + tile * 2 + 1, 0.0)
    tl.store(of_scalars + tile * 2, tl.sum(tl.sum(d_scale, 1), 0))

"""Forward: which program owns which queries."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rows import sum_of_products
from .attend import attend, load_tile, store_tile, token_offsets


@triton.jit(do_not_specialize=["texts"])
def texts_kernel(
    q,
    k,
    v,
    out,
    top,
    factor,
    q_item,
    q_token,
    q_head,
    k_item,
    k_token,
    k_head,
    v_item,
    v_token,
    v_head,
    texts,
    scale,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Text queries over the texts: out [groups, C, H, WIDTH] fp32, its softmax [groups, C, H]."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2).to(tl.int64)
    inside = rows < texts
    q += group * q_item + head * q_head
    tile = load_tile(q, rows.to(tl.int64) * q_token, inside, WIDTH, BLOCK_D)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    most = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums, most, total = attend(
        tile, sums, most, total, k + group * k_item + head * k_head,
        v + group * v_item + head * v_head, 0, k_token, 0, v_token, 0, texts, texts, rows, scale,
        0.0, False, PRECISION, WIDTH, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    place = (group * texts + rows) * HEADS + head
    share = 1.0 / total
    store_tile(out, place * WIDTH, inside, sums * share[:, None], WIDTH, BLOCK_D)
    tl.store(top + place, most, mask=inside)
    tl.store(factor + place, share, mask=inside)


@triton.jit
def load_vector(x, offset, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """One token of one head, in fp32 [1, BLOCK_D]."""
    cols = tl.arange(0, BLOCK_D)
    return tl.load(x + offset + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["texts", "images"])
def text_out_kernel(
    q,
    k,
    v,
    out,
    of_texts,
    top,
    factor,
    q_item,
    q_token,
    q_head,
    k_item,
    k_token,
    k_head,
    v_item,
    v_token,
    v_head,
    texts,
    images,
    scale,
    shift,
    SHARED: tl.constexpr,
    TEXTS: tl.constexpr,
    IMAGES: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """What an item's texts see: by what `texts_kernel` left where there are TEXTS, and IMAGES."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    item = tl.program_id(2).to(tl.int64)
    group = item * 0 if SHARED else item
    inside = rows < texts
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    most = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if TEXTS:
        place = (group * texts + rows) * HEADS + head
        most = tl.load(top + place, mask=inside, other=0.0)
        total = 1.0 / tl.load(factor + place, mask=inside, other=1.0)
        sums = load_tile(of_texts, place * WIDTH, inside, WIDTH, BLOCK_D) * total[:, None]
    if IMAGES:
        q += group * q_item + head * q_head
        tile = load_tile(q, rows.to(tl.int64) * q_token, inside, WIDTH, BLOCK_D).to(tl.float32)
        k += item * k_item + head * k_head
        v += item * v_item + head * v_head
        for i in range(images):
            image = tl.cast(i, tl.int64)
            key = load_vector(k, image * k_token, WIDTH, BLOCK_D)
            scores = sum_of_products(tile, key, 1) * scale + shift
            higher = tl.maximum(most, scores)
            keep = tl.exp2(most - higher)
            p = tl.exp2(scores - higher)
            total = total * keep + p
            value = load_vector(v, image * v_token, WIDTH, BLOCK_D)
            sums = sums * keep[:, None] + p[:, None] * value
            most = higher
    if TEXTS or IMAGES:
        sums /= total[:, None]
    place = (item * texts + rows) * HEADS + head
    store_tile(out, place * WIDTH, inside, sums, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=["texts", "images", "n_rows"])
def image_out_kernel(
    q,
    text_k,
    text_v,
    image_k,
    image_v,
    out,
    saved,
    top,
    factor,
    q_item,
    q_token,
    q_head,
    text_k_item,
    text_k_token,
    text_k_head,
    text_v_item,
    text_v_token,
    text_v_head,
    image_k_item,
    image_k_token,
    image_k_head,
    image_v_item,
    image_v_token,
    image_v_head,
    texts,
    images,
    n_rows,
    scale,
    shift,
    TEXTS: tl.constexpr,
    IMAGES: tl.constexpr,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Image queries, ``n_rows`` of each group's items end to end, over texts and own images."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2).to(tl.int64)
    inside = rows < n_rows
    items = tl.where(inside, rows // images, -1)
    n_items = n_rows // images
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    most = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if TEXTS or IMAGES:
        q += group * n_items * q_item + head * q_head
        tile = load_tile(q, token_offsets(rows, images, q_item, q_token), inside, WIDTH, BLOCK_D)
    if TEXTS:
        sums, most, total = attend(
            tile, sums, most, total, text_k + group * text_k_item + head * text_k_head,
            text_v + group * text_v_item + head * text_v_head, 0, text_k_token, 0, text_v_token,
            0, texts, texts, items, scale, 0.0, False, PRECISION, WIDTH, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    if IMAGES:
        first = tl.program_id(0) * BLOCK_M
        last = tl.minimum(first + BLOCK_M, n_rows) - 1
        sums, most, total = attend(
            tile, sums, most, total, image_k + group * n_items * image_k_item + head * image_k_head,
            image_v + group * n_items * image_v_item + head * image_v_head, image_k_item,
            image_k_token, image_v_item, image_v_token, first // images * images,
            (last // images + 1) * images, images, items, scale, shift, True, PRECISION, WIDTH,
            BLOCK_D, BLOCK_N,
        )  # fmt: skip
    place = (group * n_rows + rows) * HEADS + head
    if TEXTS or IMAGES:
        share = 1.0 / tl.where(inside, total, 1.0)
        sums *= share[:, None]
        if saved is not None:
            store_tile(saved, place * WIDTH, inside, sums, WIDTH, BLOCK_D)
            tl.store(top + place, most, mask=inside)
            tl.store(factor + place, share, mask=inside)
    store_tile(out, place * WIDTH, inside, sums, WIDTH, BLOCK_D)

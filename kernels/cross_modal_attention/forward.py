"""Forward: which program owns which queries."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rows import sum_of_products
from .attend import (
    attend,
    load_softmax,
    load_tile,
    load_token,
    load_tokens,
    merge,
    store_tile,
)


@triton.jit(do_not_specialize=["texts"])
def texts_kernel(
    q,
    k,
    v,
    out,
    softmax,
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
    tile = load_tokens(q, group, rows, None, head, inside, WIDTH, BLOCK_D)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    most = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums, most, total = attend(
        tile, sums, most, total, k, v, group, 0, texts, None, None, head, scale, 0.0,
        PRECISION, WIDTH, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    place = (group * texts + rows) * HEADS + head
    share = 1.0 / total
    store_tile(out, place * WIDTH, inside, sums * share[:, None], WIDTH, BLOCK_D)
    tl.store(softmax[0] + place, most, mask=inside)
    tl.store(softmax[1] + place, share, mask=inside)


@triton.jit(do_not_specialize=["texts", "images"])
def text_out_kernel(
    q,
    k,
    v,
    out,
    of_texts,
    softmax,
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
        most, share = load_softmax(softmax, place, inside)
        total = 1.0 / tl.where(inside, share, 1.0)
        sums = load_tile(of_texts, place * WIDTH, inside, WIDTH, BLOCK_D) * total[:, None]
    if IMAGES:
        tile = load_tokens(q, group, rows, None, head, inside, WIDTH, BLOCK_D).to(tl.float32)
        for i in range(images):
            key = load_token(k, item, i, head, WIDTH, BLOCK_D)
            scores = sum_of_products(tile, key, 1) * scale + shift
            most, total, keep, p = merge(most, total, scores)
            value = load_token(v, item, i, head, WIDTH, BLOCK_D)
            sums = sums * keep[:, None] + p[:, None] * value
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
    softmax,
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
    first = group * (n_rows // images)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    most = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if TEXTS or IMAGES:
        tile = load_tokens(q, first, rows, images, head, inside, WIDTH, BLOCK_D)
    if TEXTS:
        sums, most, total = attend(
            tile, sums, most, total, text_k, text_v, group, 0, texts, None, None, head, scale, 0.0,
            PRECISION, WIDTH, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    if IMAGES:
        begin = tl.program_id(0) * BLOCK_M
        last = tl.minimum(begin + BLOCK_M, n_rows) - 1
        sums, most, total = attend(
            tile, sums, most, total, image_k, image_v, first, begin // images * images,
            (last // images + 1) * images, images, rows // images, head, scale, shift,
            PRECISION, WIDTH, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    place = (group * n_rows + rows) * HEADS + head
    if TEXTS or IMAGES:
        share = 1.0 / tl.where(inside, total, 1.0)
        sums *= share[:, None]
        if saved is not None:
            store_tile(saved, place * WIDTH, inside, sums, WIDTH, BLOCK_D)
            tl.store(softmax[0] + place, most, mask=inside)
            tl.store(softmax[1] + place, share, mask=inside)
    store_tile(out, place * WIDTH, inside, sums, WIDTH, BLOCK_D)

"""Backward: the gradients of queries, each by the program that owns them."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rows import sum_of_products
from .attend import gradient_of_scores, load_tile, store_tile, token_offsets
from .forward import load_vector


@triton.jit(do_not_specialize=["texts", "images", "items", "items_of_split"])
def text_images_kernel(
    d_out,
    q,
    k,
    v,
    of_texts,
    top,
    factor,
    d_texts,
    d_delta,
    dq,
    dk,
    dv,
    d_out_item,
    d_out_token,
    d_out_head,
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
    items,
    items_of_split,
    scale,
    shift,
    TEXTS: tl.constexpr,
    IMAGES: tl.constexpr,
    SINGLE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Text queries over the images of some items of a group, whose d_out is read here alone.

    For the keys that are texts it leaves sums over these items, [splits, groups, C, H, WIDTH] and
    [splits, groups, C, H]: of w d_out and of w delta, w the item's share of its texts. ``dq`` is
    like the first. The gradients of image keys and values come for each block of texts apart,
    [blocks, B, I, H, WIDTH].
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1) % HEADS
    group = (tl.program_id(1) // HEADS).to(tl.int64)
    split = tl.program_id(2)
    groups = tl.num_programs(1) // HEADS
    inside = rows < texts
    tile = load_tile(
        q + group * q_item + head * q_head, rows.to(tl.int64) * q_token, inside, WIDTH, BLOCK_D
    ).to(tl.float32)
    place = (group * texts + rows) * HEADS + head
    text_top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    text_total = tl.zeros([BLOCK_M], tl.float32)
    text_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if TEXTS:
        text_top = tl.load(top + place, mask=inside, other=0.0)
        text_total = 1.0 / tl.load(factor + place, mask=inside, other=1.0)
        text_tile = load_tile(of_texts, place * WIDTH, inside, WIDTH, BLOCK_D)
    sum_d_texts = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sum_delta = tl.zeros([BLOCK_M], tl.float32)
    sum_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = split * items_of_split
    for i in range(begin, tl.minimum(begin + items_of_split, items)):
        item = group * items + i
        gradient = load_tile(
            d_out + item * d_out_item + head * d_out_head, rows.to(tl.int64) * d_out_token, inside,
            WIDTH, BLOCK_D,
        ).to(tl.float32)  # fmt: skip
        most = text_top
        total = text_total
        by_texts = sum_of_products(gradient, text_tile, 1)
        delta = by_texts * total
        if IMAGES:
            of_k = k + item * k_item + head * k_head
            of_v = v + item * v_item + head * v_head
            for j in range(images):
                image = tl.cast(j, tl.int64)
                key = load_vector(of_k, image * k_token, WIDTH, BLOCK_D)
                value = load_vector(of_v, image * v_token, WIDTH, BLOCK_D)
                scores = sum_of_products(tile, key, 1) * scale + shift
                higher = tl.maximum(most, scores)
                keep = tl.exp2(most - higher)
                p = tl.exp2(scores - higher)
                total = total * keep + p
                delta = delta * keep + p * sum_of_products(gradient, value, 1)
                most = higher
        share = 1.0 / total
        delta *= share
        if TEXTS:
            w = text_total * tl.exp2(text_top - most) * share
            sum_d_texts += w[:, None] * gradient
            sum_delta += w * delta
        if IMAGES:
            slab = (tl.program_id(0) * groups * items + item) * images
            for j in range(images):
                image = tl.cast(j, tl.int64)
                key = load_vector(of_k, image * k_token, WIDTH, BLOCK_D)
                value = load_vector(of_v, image * v_token, WIDTH, BLOCK_D)
                scores = sum_of_products(tile, key, 1) * scale + shift
                p = tl.where(inside, tl.exp2(scores - most) * share, 0.0)
                cols = tl.arange(0, BLOCK_D)
                to = ((slab + j) * HEADS + head) * WIDTH + cols
                tl.store(dv + to, tl.sum(p[:, None] * gradient, 0), mask=cols < WIDTH)
                d_scores = p * (sum_of_products(gradient, value, 1) - delta)
                if SINGLE:
                    d_scores = tl.zeros([BLOCK_M], tl.float32)
                sum_dq += d_scores[:, None] * key
                tl.store(dk + to, tl.sum(d_scores[:, None] * tile, 0), mask=cols < WIDTH)
    place += split * groups * texts * HEADS
    if TEXTS:
        store_tile(d_texts, place * WIDTH, inside, sum_d_texts, WIDTH, BLOCK_D)
        tl.store(d_delta + place, sum_delta, mask=inside)
    store_tile(dq, place * WIDTH, inside, sum_dq, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=["texts", "splits"])
def text_queries_kernel(
    d_texts,
    d_delta,
    dq_images,
    q,
    k,
    v,
    top,
    factor,
    dq,
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
    splits,
    scale,
    factor_of_dq,
    TEXTS: tl.constexpr,
    SINGLE: tl.constexpr,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM_PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds up the splits of `text_images_kernel`, in order, to a place behind them; and dq."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2).to(tl.int64)
    inside = rows < texts
    place = (group * texts + rows) * HEADS + head
    stride = tl.num_programs(2).to(tl.int64) * texts * HEADS
    sum_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    for i in range(splits):
        at = place + i * stride
        sum_dq += load_tile(dq_images, at * WIDTH, inside, WIDTH, BLOCK_D)
        if TEXTS:
            gradient += load_tile(d_texts, at * WIDTH, inside, WIDTH, BLOCK_D)
            delta += tl.load(d_delta + at, mask=inside, other=0.0)
    if TEXTS:
        behind = place + splits * stride
        store_tile(d_texts, behind * WIDTH, inside, gradient, WIDTH, BLOCK_D)
        tl.store(d_delta + behind, delta, mask=inside)
        if dq is not None and not SINGLE:
            tile = load_tile(
                q + group * q_item + head * q_head, rows.to(tl.int64) * q_token, inside, WIDTH,
                BLOCK_D,
            )  # fmt: skip
            most = tl.load(top + place, mask=inside, other=0.0)
            share = tl.load(factor + place, mask=inside, other=0.0)
            for start in range(0, texts, BLOCK_N):
                keys = start + tl.arange(0, BLOCK_N)
                seen = keys < texts
                wide = keys.to(tl.int64)
                k_tile = load_tile(
                    k + group * k_item + head * k_head, wide * k_token, seen, WIDTH, BLOCK_D
                )
                v_tile = load_tile(
                    v + group * v_item + head * v_head, wide * v_token, seen, WIDTH, BLOCK_D
                )
                _, d_scores = gradient_of_scores(
                    tile, gradient, delta, most, share, k_tile, v_tile,
                    inside[:, None] & seen[None, :], scale, 0.0, PRECISION, SUM_PRECISION,
                )  # fmt: skip
                sum_dq = tl.dot(
                    d_scores, k_tile.to(tl.float32), sum_dq, input_precision=SUM_PRECISION
                )
    if dq is not None:
        store_tile(dq, place * WIDTH, inside, sum_dq * factor_of_dq, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=["texts", "images", "n_rows"])
def image_queries_kernel(
    d_out,
    saved,
    q,
    text_k,
    text_v,
    image_k,
    image_v,
    top,
    factor,
    delta,
    dq,
    d_out_item,
    d_out_token,
    d_out_head,
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
    factor_of_dq,
    TEXTS: tl.constexpr,
    IMAGES: tl.constexpr,
    SINGLE: tl.constexpr,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """delta = d_out . out [B, I, H] of image queries, and dq unless it is None."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2).to(tl.int64)
    inside = rows < n_rows
    n_items = n_rows // images
    place = (group * n_rows + rows) * HEADS + head
    gradient = load_tile(
        d_out + group * n_items * d_out_item + head * d_out_head,
        token_offsets(rows, images, d_out_item, d_out_token), inside, WIDTH, BLOCK_D,
    )  # fmt: skip
    out = load_tile(saved, place * WIDTH, inside, WIDTH, BLOCK_D)
    difference = sum_of_products(gradient.to(tl.float32), out, 1)
    tl.store(delta + place, difference, mask=inside)
    if dq is not None:
        sum_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if not SINGLE:
            tile = load_tile(
                q + group * n_items * q_item + head * q_head,
                token_offsets(rows, images, q_item, q_token), inside, WIDTH, BLOCK_D,
            )  # fmt: skip
            most = tl.load(top + place, mask=inside, other=0.0)
            share = tl.load(factor + place, mask=inside, other=0.0)
            if TEXTS:
                for start in range(0, texts, BLOCK_N):
                    keys = start + tl.arange(0, BLOCK_N)
                    seen = keys < texts
                    wide = keys.to(tl.int64)
                    k_tile = load_tile(
                        text_k + group * text_k_item + head * text_k_head, wide * text_k_token,
                        seen, WIDTH, BLOCK_D,
                    )  # fmt: skip
                    v_tile = load_tile(
                        text_v + group * text_v_item + head * text_v_head, wide * text_v_token,
                        seen, WIDTH, BLOCK_D,
                    )  # fmt: skip
                    _, d_scores = gradient_of_scores(
                        tile, gradient, difference, most, share, k_tile, v_tile,
                        inside[:, None] & seen[None, :], scale, 0.0, PRECISION, PRECISION,
                    )  # fmt: skip
                    sum_dq = tl.dot(
                        d_scores.to(k_tile.dtype), k_tile, sum_dq, input_precision=PRECISION
                    )
            if IMAGES:
                first = tl.program_id(0) * BLOCK_M
                last = tl.minimum(first + BLOCK_M, n_rows) - 1
                end = (last // images + 1) * images
                for start in range(first // images * images, end, BLOCK_N):
                    keys = start + tl.arange(0, BLOCK_N)
                    seen = keys < end
                    k_tile = load_tile(
                        image_k + group * n_items * image_k_item + head * image_k_head,
                        token_offsets(keys, images, image_k_item, image_k_token), seen, WIDTH,
                        BLOCK_D,
                    )  # fmt: skip
                    v_tile = load_tile(
                        image_v + group * n_items * image_v_item + head * image_v_head,
                        token_offsets(keys, images, image_v_item, image_v_token), seen, WIDTH,
                        BLOCK_D,
                    )  # fmt: skip
                    own = (rows // images)[:, None] == (keys // images)[None, :]
                    _, d_scores = gradient_of_scores(
                        tile, gradient, difference, most, share, k_tile, v_tile,
                        inside[:, None] & seen[None, :] & own, scale, shift, PRECISION, PRECISION,
                    )  # fmt: skip
                    sum_dq = tl.dot(
                        d_scores.to(k_tile.dtype), k_tile, sum_dq, input_precision=PRECISION
                    )
        store_tile(dq, place * WIDTH, inside, sum_dq * factor_of_dq, WIDTH, BLOCK_D)

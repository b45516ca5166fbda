"""Backward: the gradients of queries, each by the program that owns them."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rows import sum_of_products
from .attend import (
    gradient_of_scores,
    load_softmax,
    load_tile,
    load_token,
    load_tokens,
    merge,
    store_tile,
)


@triton.jit(do_not_specialize=["texts", "images", "items", "items_of_split"])
def text_images_kernel(
    d_out,
    q,
    k,
    v,
    of_texts,
    softmax,
    d_texts,
    d_delta,
    dq,
    dk,
    dv,
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
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    group = (tl.program_id(1) // HEADS).to(tl.int64)
    split = tl.program_id(2)
    groups = tl.num_programs(1) // HEADS
    inside = rows < texts
    tile = load_tokens(q, group, rows, None, head, inside, WIDTH, BLOCK_D).to(tl.float32)
    place = (group * texts + rows) * HEADS + head
    text_top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    text_total = tl.zeros([BLOCK_M], tl.float32)
    text_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if TEXTS:
        text_top, text_share = load_softmax(softmax, place, inside)
        text_total = 1.0 / tl.where(inside, text_share, 1.0)
        text_tile = load_tile(of_texts, place * WIDTH, inside, WIDTH, BLOCK_D)
    sum_d_texts = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sum_delta = tl.zeros([BLOCK_M], tl.float32)
    sum_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = split * items_of_split
    for i in range(begin, tl.minimum(begin + items_of_split, items)):
        item = group * items + i
        gradient = load_tokens(d_out, item, rows, None, head, inside, WIDTH, BLOCK_D)
        gradient = gradient.to(tl.float32)
        most = text_top
        total = text_total
        by_texts = sum_of_products(gradient, text_tile, 1)
        delta = by_texts * total
        if IMAGES:
            for j in range(images):
                key = load_token(k, item, j, head, WIDTH, BLOCK_D)
                value = load_token(v, item, j, head, WIDTH, BLOCK_D)
                scores = sum_of_products(tile, key, 1) * scale + shift
                most, total, keep, p = merge(most, total, scores)
                delta = delta * keep + p * sum_of_products(gradient, value, 1)
        share = 1.0 / total
        delta *= share
        if TEXTS:
            w = text_total * tl.exp2(text_top - most) * share
            sum_d_texts += w[:, None] * gradient
            sum_delta += w * delta
        if IMAGES:
            slab = (tl.program_id(0) * groups * items + item) * images
            for j in range(images):
                key = load_token(k, item, j, head, WIDTH, BLOCK_D)
                value = load_token(v, item, j, head, WIDTH, BLOCK_D)
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


@triton.jit
def _add_to_queries(
    dq,
    q,
    d_out,
    delta,
    softmax,
    k,
    v,
    first,
    begin,
    end,
    tokens,
    items,
    head,
    inside,
    scale,
    shift,
    PRECISION: tl.constexpr,
    SUM_PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq += d_scores k over the keys that `attend` takes with the same arguments.

    softmax: the two constants of each row of the tiles q and d_out.
    """
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        seen = keys < end
        k_tile = load_tokens(k, first, keys, tokens, head, seen, WIDTH, BLOCK_D)
        v_tile = load_tokens(v, first, keys, tokens, head, seen, WIDTH, BLOCK_D)
        visible = inside[:, None] & seen[None, :]
        if tokens is not None:
            visible &= items[:, None] == (keys // tokens)[None, :]
        _, d_scores = gradient_of_scores(
            q, d_out, delta, softmax[0], softmax[1], k_tile, v_tile, visible, scale, shift,
            PRECISION, SUM_PRECISION,
        )  # fmt: skip
        d_scores = d_scores.to(d_out.dtype)
        dq = tl.dot(d_scores, k_tile.to(d_out.dtype), dq, input_precision=SUM_PRECISION)
    return dq


@triton.jit(do_not_specialize=["texts", "splits"])
def text_queries_kernel(
    d_texts,
    d_delta,
    dq_images,
    q,
    k,
    v,
    softmax,
    dq,
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
            tile = load_tokens(q, group, rows, None, head, inside, WIDTH, BLOCK_D)
            sum_dq = _add_to_queries(
                sum_dq, tile, gradient, delta, load_softmax(softmax, place, inside), k, v, group,
                0, texts, None, None, head, inside, scale, 0.0, PRECISION, SUM_PRECISION, WIDTH,
                BLOCK_D, BLOCK_N,
            )  # fmt: skip
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
    softmax,
    delta,
    dq,
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
    first = group * (n_rows // images)
    place = (group * n_rows + rows) * HEADS + head
    gradient = load_tokens(d_out, first, rows, images, head, inside, WIDTH, BLOCK_D)
    out = load_tile(saved, place * WIDTH, inside, WIDTH, BLOCK_D)
    difference = sum_of_products(gradient.to(tl.float32), out, 1)
    tl.store(delta + place, difference, mask=inside)
    if dq is not None:
        sum_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if not SINGLE:
            tile = load_tokens(q, first, rows, images, head, inside, WIDTH, BLOCK_D)
            constants = load_softmax(softmax, place, inside)
            if TEXTS:
                sum_dq = _add_to_queries(
                    sum_dq, tile, gradient, difference, constants, text_k, text_v, group, 0, texts,
                    None, None, head, inside, scale, 0.0, PRECISION, PRECISION, WIDTH, BLOCK_D,
                    BLOCK_N,
                )  # fmt: skip
            if IMAGES:
                begin = tl.program_id(0) * BLOCK_M
                last = tl.minimum(begin + BLOCK_M, n_rows) - 1
                sum_dq = _add_to_queries(
                    sum_dq, tile, gradient, difference, constants, image_k, image_v, first,
                    begin // images * images, (last // images + 1) * images, images,
                    rows // images, head, inside, scale, shift, PRECISION, PRECISION, WIDTH,
                    BLOCK_D, BLOCK_N,
                )  # fmt: skip
        store_tile(dq, place * WIDTH, inside, sum_dq * factor_of_dq, WIDTH, BLOCK_D)

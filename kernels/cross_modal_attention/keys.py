"""Backward: the gradients of keys and values."""

from __future__ import annotations

import triton
import triton.language as tl

from .attend import gradient_of_scores, load_tile, store_tile, token_offsets


@triton.jit
def add_products(dk, dv, p, d_scores, q, d_out, SINGLE: tl.constexpr, PRECISION: tl.constexpr):
    """dv += p^T d_out and dk += d_scores^T q, of a tile of queries."""
    dv = tl.dot(tl.trans(p.to(d_out.dtype)), d_out, dv, input_precision=PRECISION)
    if not SINGLE:
        q = q.to(d_out.dtype)
        dk = tl.dot(tl.trans(d_scores.to(q.dtype)), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["texts", "images", "n_rows"])
def text_keys_kernel(
    d_texts,
    d_delta,
    d_out,
    delta,
    text_q,
    image_q,
    k,
    v,
    text_top,
    text_factor,
    image_top,
    image_factor,
    dk,
    dv,
    d_out_item,
    d_out_token,
    d_out_head,
    text_q_item,
    text_q_token,
    text_q_head,
    image_q_item,
    image_q_token,
    image_q_head,
    k_item,
    k_token,
    k_head,
    v_item,
    v_token,
    v_head,
    texts,
    images,
    n_rows,
    scale,
    factor_of_dk,
    BY_TEXTS: tl.constexpr,
    BY_IMAGES: tl.constexpr,
    SINGLE_TEXT: tl.constexpr,
    SINGLE_IMAGE: tl.constexpr,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM_PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Text keys, seen by text queries (BY_TEXTS) and by the image queries of a group's items."""
    keys = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2).to(tl.int64)
    seen = keys < texts
    wide = keys.to(tl.int64)
    k_tile = load_tile(k + group * k_item + head * k_head, wide * k_token, seen, WIDTH, BLOCK_D)
    v_tile = load_tile(v + group * v_item + head * v_head, wide * v_token, seen, WIDTH, BLOCK_D)
    sum_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sum_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if BY_TEXTS:
        for start in range(0, texts, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            inside = rows < texts
            place = (group * texts + rows) * HEADS + head
            tile = load_tile(
                text_q + group * text_q_item + head * text_q_head,
                rows.to(tl.int64) * text_q_token, inside, WIDTH, BLOCK_D,
            )  # fmt: skip
            gradient = load_tile(d_texts, place * WIDTH, inside, WIDTH, BLOCK_D)
            difference = tl.load(d_delta + place, mask=inside, other=0.0)
            most = tl.load(text_top + place, mask=inside, other=0.0)
            share = tl.load(text_factor + place, mask=inside, other=0.0)
            p, d_scores = gradient_of_scores(
                tile, gradient, difference, most, share, k_tile, v_tile,
                inside[:, None] & seen[None, :], scale, 0.0, PRECISION, SUM_PRECISION,
            )  # fmt: skip
            sum_dk, sum_dv = add_products(
                sum_dk, sum_dv, p, d_scores, tile, gradient, SINGLE_TEXT, SUM_PRECISION
            )
    if BY_IMAGES:
        n_items = n_rows // images
        for start in range(0, n_rows, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            inside = rows < n_rows
            place = (group * n_rows + rows) * HEADS + head
            tile = load_tile(
                image_q + group * n_items * image_q_item + head * image_q_head,
                token_offsets(rows, images, image_q_item, image_q_token), inside, WIDTH, BLOCK_D,
            )  # fmt: skip
            gradient = load_tile(
                d_out + group * n_items * d_out_item + head * d_out_head,
                token_offsets(rows, images, d_out_item, d_out_token), inside, WIDTH, BLOCK_D,
            )  # fmt: skip
            difference = tl.load(delta + place, mask=inside, other=0.0)
            most = tl.load(image_top + place, mask=inside, other=0.0)
            share = tl.load(image_factor + place, mask=inside, other=0.0)
            p, d_scores = gradient_of_scores(
                tile, gradient, difference, most, share, k_tile, v_tile,
                inside[:, None] & seen[None, :], scale, 0.0, PRECISION, PRECISION,
            )  # fmt: skip
            sum_dk, sum_dv = add_products(
                sum_dk, sum_dv, p, d_scores, tile, gradient, SINGLE_IMAGE, PRECISION
            )
    place = ((group * texts + keys) * HEADS + head) * WIDTH
    if dk is not None:
        store_tile(dk, place, seen, sum_dk * factor_of_dk, WIDTH, BLOCK_D)
    if dv is not None:
        store_tile(dv, place, seen, sum_dv, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=["n_rows", "images", "blocks"])
def image_keys_kernel(
    d_out,
    delta,
    q,
    k,
    v,
    top,
    factor,
    dk_parts,
    dv_parts,
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
    n_rows,
    images,
    blocks,
    scale,
    shift,
    factor_of_dk,
    BY_TEXTS: tl.constexpr,
    BY_IMAGES: tl.constexpr,
    SINGLE: tl.constexpr,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Image keys [B, I]: seen by their items' image queries, and what the texts left in blocks."""
    first = tl.program_id(0) * BLOCK_N
    keys = first + tl.arange(0, BLOCK_N)
    head = tl.program_id(1).to(tl.int64)
    seen = keys < n_rows
    sum_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sum_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if BY_IMAGES:
        k_tile = load_tile(
            k + head * k_head, token_offsets(keys, images, k_item, k_token), seen, WIDTH, BLOCK_D
        )
        v_tile = load_tile(
            v + head * v_head, token_offsets(keys, images, v_item, v_token), seen, WIDTH, BLOCK_D
        )
        last = tl.minimum(first + BLOCK_N, n_rows) - 1
        end = (last // images + 1) * images
        for start in range(first // images * images, end, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            inside = rows < end
            place = rows.to(tl.int64) * HEADS + head
            tile = load_tile(
                q + head * q_head, token_offsets(rows, images, q_item, q_token), inside, WIDTH,
                BLOCK_D,
            )  # fmt: skip
            gradient = load_tile(
                d_out + head * d_out_head, token_offsets(rows, images, d_out_item, d_out_token),
                inside, WIDTH, BLOCK_D,
            )  # fmt: skip
            difference = tl.load(delta + place, mask=inside, other=0.0)
            most = tl.load(top + place, mask=inside, other=0.0)
            share = tl.load(factor + place, mask=inside, other=0.0)
            own = (rows // images)[:, None] == (keys // images)[None, :]
            p, d_scores = gradient_of_scores(
                tile, gradient, difference, most, share, k_tile, v_tile,
                inside[:, None] & seen[None, :] & own, scale, shift, PRECISION, PRECISION,
            )  # fmt: skip
            sum_dk, sum_dv = add_products(
                sum_dk, sum_dv, p, d_scores, tile, gradient, SINGLE, PRECISION
            )
    place = (keys.to(tl.int64) * HEADS + head) * WIDTH
    if BY_TEXTS:
        stride = tl.cast(n_rows, tl.int64) * HEADS * WIDTH
        for i in range(blocks):
            sum_dk += load_tile(dk_parts, place + i * stride, seen, WIDTH, BLOCK_D)
            sum_dv += load_tile(dv_parts, place + i * stride, seen, WIDTH, BLOCK_D)
    if dk is not None:
        store_tile(dk, place, seen, sum_dk * factor_of_dk, WIDTH, BLOCK_D)
    if dv is not None:
        store_tile(dv, place, seen, sum_dv, WIDTH, BLOCK_D)

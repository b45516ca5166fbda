"""Backward: the gradients of keys and values."""

from __future__ import annotations

import triton
import triton.language as tl

from .attend import gradient_of_scores, load_softmax, load_tile, load_tokens, store_tile


@triton.jit
def _add_to_keys(
    dk,
    dv,
    k_tile,
    v_tile,
    q,
    d_out,
    delta,
    softmax,
    first,
    before,
    begin,
    end,
    tokens,
    keys,
    seen,
    head,
    scale,
    shift,
    SINGLE: tl.constexpr,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM_PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """dv += p^T d_out and dk += d_scores^T q over query rows begin ... end - 1.

    The constants of the rows begin after those of ``before`` others. keys: the items of the keys,
    where they are seen by queries of their own alone.
    """
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = rows < end
        place = (before + rows) * HEADS + head
        tile = load_tokens(q, first, rows, tokens, head, inside, WIDTH, BLOCK_D)
        gradient = load_tokens(d_out, first, rows, tokens, head, inside, WIDTH, BLOCK_D)
        difference = tl.load(delta + place, mask=inside, other=0.0)
        most, share = load_softmax(softmax, place, inside)
        visible = inside[:, None] & seen[None, :]
        if keys is not None:
            visible &= (rows // tokens)[:, None] == keys[None, :]
        p, d_scores = gradient_of_scores(
            tile, gradient, difference, most, share, k_tile, v_tile, visible, scale, shift,
            PRECISION, SUM_PRECISION,
        )  # fmt: skip
        p = tl.trans(p.to(gradient.dtype))
        dv = tl.dot(p, gradient, dv, input_precision=SUM_PRECISION)
        if not SINGLE:
            d_scores = tl.trans(d_scores.to(gradient.dtype))
            dk = tl.dot(d_scores, tile.to(gradient.dtype), dk, input_precision=SUM_PRECISION)
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
    text_softmax,
    image_softmax,
    dk,
    dv,
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
    k_tile = load_tokens(k, group, keys, None, head, seen, WIDTH, BLOCK_D)
    v_tile = load_tokens(v, group, keys, None, head, seen, WIDTH, BLOCK_D)
    sum_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sum_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if BY_TEXTS:
        sum_dk, sum_dv = _add_to_keys(
            sum_dk, sum_dv, k_tile, v_tile, text_q, d_texts, d_delta, text_softmax, group,
            group * texts, 0, texts, None, None, seen, head, scale, 0.0, SINGLE_TEXT, HEADS,
            PRECISION, SUM_PRECISION, WIDTH, BLOCK_D, BLOCK_M,
        )  # fmt: skip
    if BY_IMAGES:
        sum_dk, sum_dv = _add_to_keys(
            sum_dk, sum_dv, k_tile, v_tile, image_q, d_out, delta, image_softmax,
            group * (n_rows // images), group * n_rows, 0, n_rows, images, None, seen, head, scale,
            0.0, SINGLE_IMAGE, HEADS, PRECISION, PRECISION, WIDTH, BLOCK_D, BLOCK_M,
        )  # fmt: skip
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
    softmax,
    dk_parts,
    dv_parts,
    dk,
    dv,
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
        k_tile = load_tokens(k, 0, keys, images, head, seen, WIDTH, BLOCK_D)
        v_tile = load_tokens(v, 0, keys, images, head, seen, WIDTH, BLOCK_D)
        last = tl.minimum(first + BLOCK_N, n_rows) - 1
        sum_dk, sum_dv = _add_to_keys(
            sum_dk, sum_dv, k_tile, v_tile, q, d_out, delta, softmax, 0, tl.cast(0, tl.int64),
            first // images * images, (last // images + 1) * images, images, keys // images, seen,
            head, scale, shift, SINGLE, HEADS, PRECISION, PRECISION, WIDTH, BLOCK_D, BLOCK_M,
        )  # fmt: skip
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

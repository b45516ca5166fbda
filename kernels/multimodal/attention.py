"""Attention of text and image queries over the texts, which no item changes."""

from __future__ import annotations

import triton
import triton.language as tl

from ..products import multiply, plus
from ..rows import sum_of_products
from .forms import BOTH, ITEM, NOTHING, TEXTS
from .linear import rows_of_block


@triton.jit
def load_head(base, rows, in_rows, stride, units, head_dim):
    """[rows, head width] of a head that begins at ``base``; zeros outside."""
    return tl.load(
        base + rows[:, None] * stride + units[None, :],
        mask=in_rows[:, None] & (units < head_dim)[None, :],
        other=0.0,
    )


@triton.jit
def store_head(base, rows, in_rows, stride, units, head_dim, tile):
    tl.store(
        base + rows[:, None] * stride + units[None, :],
        tile,
        mask=in_rows[:, None] & (units < head_dim)[None, :],
    )


@triton.jit
def shares(odds):
    """sigmoid(odds) and sigmoid(-odds), each as exact where it is small."""
    decay = tl.exp(-tl.abs(odds))
    large = 1.0 / (1.0 + decay)
    small = decay * large
    positive = odds >= 0.0
    return tl.where(positive, large, small), tl.where(positive, small, large)


@triton.jit(do_not_specialize=["n_texts", "n_images", "C"])
def attention_kernel(
    qkv,
    attended,
    lse,
    mixed,
    shift,
    scale,
    n_texts,
    n_images,
    C,
    H,
    head_dim,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Attention [C + B, E] of queries over the texts and its log-sum-exp [C + B, H].

    qkv is [C + B, 3 E]; the queries are the first n_texts and those from C on. An image's is mixed
    with its own value [B, E], of log-odds q.k + shift - lse.
    """
    rows, in_rows, is_image = rows_of_block(n_texts, n_images, BLOCK_M)
    head = tl.program_id(1)
    E = H * head_dim
    units = tl.arange(0, BLOCK_H)
    items = rows
    rows += tl.where(is_image, C, 0)
    of_head = qkv + head * head_dim
    q = load_head(of_head, rows, in_rows, 3 * E, units, head_dim) * scale
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for start in range(0, C, BLOCK_N):
        keys = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        in_keys = keys < C
        k = load_head(of_head + E, keys, in_keys, 3 * E, units, head_dim)
        v = load_head(of_head + 2 * E, keys, in_keys, 3 * E, units, head_dim)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.where(in_keys[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(top - higher)
        total = total * fade + tl.sum(weights, 1)
        out = plus(out * fade[:, None], tl.dot(weights, v, input_precision=PRECISION))
        top = higher
    out = out / total[:, None]
    log_sum = top + tl.log(total)
    store_head(attended + head * head_dim, rows, in_rows, E, units, head_dim, out)
    tl.store(lse + rows * H + head, log_sum, mask=in_rows)
    if mixed is not None and is_image:
        k = load_head(of_head + E, rows, in_rows, 3 * E, units, head_dim)
        v = load_head(of_head + 2 * E, rows, in_rows, 3 * E, units, head_dim)
        own, others = shares(sum_of_products(q, k, 1) + (shift - log_sum))
        out = others[:, None] * out + own[:, None] * v
        store_head(mixed + head * head_dim, items, in_rows, E, units, head_dim, out)


@triton.jit(do_not_specialize=["n_texts", "n_images", "C"])
def queries_kernel(
    qkv,
    d_attended,
    lse,
    delta,
    d_qkv,
    scale,
    n_texts,
    n_images,
    C,
    H,
    head_dim,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Adds the queries' gradient to d_qkv [C + B, 3 E], in which it is of the scaled query so far.

    The gradient of a score is P (dP - delta), with delta [C + B, H] = o.do - dlse.
    """
    rows, in_rows, is_image = rows_of_block(n_texts, n_images, BLOCK_M)
    head = tl.program_id(1)
    E = H * head_dim
    units = tl.arange(0, BLOCK_H)
    rows += tl.where(is_image, C, 0)
    of_head = qkv + head * head_dim
    q = load_head(of_head, rows, in_rows, 3 * E, units, head_dim) * scale
    d_out = load_head(d_attended + head * head_dim, rows, in_rows, E, units, head_dim)
    log_sum = tl.load(lse + rows * H + head, mask=in_rows, other=0.0)
    constant = tl.load(delta + rows * H + head, mask=in_rows, other=0.0)
    d_q = load_head(d_qkv + head * head_dim, rows, in_rows, 3 * E, units, head_dim)
    for start in range(0, C, BLOCK_N):
        keys = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        in_keys = keys < C
        k = load_head(of_head + E, keys, in_keys, 3 * E, units, head_dim)
        v = load_head(of_head + 2 * E, keys, in_keys, 3 * E, units, head_dim)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.where(in_keys[None, :], scores, -float("inf"))
        weights = tl.exp(scores - log_sum[:, None])
        d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        d_scores = weights * (d_weights - constant[:, None])
        d_q = plus(d_q, tl.dot(d_scores, k, input_precision=PRECISION))
    store_head(d_qkv + head * head_dim, rows, in_rows, 3 * E, units, head_dim, d_q * scale)


@triton.jit(do_not_specialize=["first", "last", "C"])
def keys_kernel(
    qkv,
    d_attended,
    lse,
    delta,
    d_qkv,
    scale,
    first,
    last,
    C,
    H,
    head_dim,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The text keys' and values' gradients, of queries first ... last - 1, to d_qkv."""
    keys = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_keys = keys < C
    head = tl.program_id(1)
    E = H * head_dim
    units = tl.arange(0, BLOCK_H)
    of_head = qkv + head * head_dim
    k = load_head(of_head + E, keys, in_keys, 3 * E, units, head_dim)
    v = load_head(of_head + 2 * E, keys, in_keys, 3 * E, units, head_dim)
    d_k = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for start in range(first, last, BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        in_rows = rows < last
        q = load_head(of_head, rows, in_rows, 3 * E, units, head_dim) * scale
        d_out = load_head(d_attended + head * head_dim, rows, in_rows, E, units, head_dim)
        log_sum = tl.load(lse + rows * H + head, mask=in_rows, other=0.0)
        constant = tl.load(delta + rows * H + head, mask=in_rows, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        scores = tl.where(in_rows[None, :], scores, -float("inf"))
        weights = tl.exp(scores - log_sum[None, :])
        d_v = plus(d_v, tl.dot(weights, d_out, input_precision=PRECISION))
        d_weights = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
        d_scores = weights * (d_weights - constant[None, :])
        d_k = plus(d_k, tl.dot(d_scores, q, input_precision=PRECISION))
    of_head = d_qkv + head * head_dim
    store_head(of_head + E, keys, in_keys, 3 * E, units, head_dim, d_k)
    store_head(of_head + 2 * E, keys, in_keys, 3 * E, units, head_dim, d_v)


@triton.jit(do_not_specialize=["C", "B", "n_up_texts"])
def heads_kernel(
    qkv,
    attended,
    lse,
    d_hidden,
    d_odds,
    d_branch,
    inner_weight,
    d_attended,
    delta,
    d_qkv,
    shift,
    scale,
    hidden_stride,
    C,
    B,
    n_up_texts,
    H,
    head_dim,
    R,
    TEXT: tl.constexpr,
    IMAGE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """What comes to a head's queries, keys and values from elsewhere than attention over texts.

    d_hidden is what each text's and each image's hidden vectors [H, R] get from the pairs, d_odds
    [H, C, B] what their log-odds get; d_branch what reaches the attention of the rows with an
    up-sampler of their own, texts before images. Written are d_qkv, that of a scaled query, and
    for attention over the texts d_attended [C + B, E] and delta [C + B, H].
    """
    rows, in_rows, is_image = rows_of_block(C, B, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    E = H * head_dim
    units = tl.arange(0, BLOCK_H)
    in_units = units < head_dim
    here = rows + tl.where(is_image, C, 0)
    d_q = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    d_k = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    d_v = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    d_out = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    d_log_sum = tl.zeros([BLOCK_M], tl.float32)
    of_head = qkv + head * head_dim
    if TEXT == BOTH:
        through = multiply(
            d_out, d_hidden + head * R, here * hidden_stride, in_rows, 1,
            inner_weight + head * head_dim, units, in_units, E, R, PRECISION, BLOCK_K,
        )  # fmt: skip
        if is_image:
            d_v += through
            d_k = multiply(
                d_k, d_odds + head * C * B, rows, in_rows, B,
                of_head, units, in_units, 3 * E, C, PRECISION, BLOCK_K,
            ) * scale  # fmt: skip
        else:
            d_out = through
            pairs = d_odds + head * C * B
            d_q = multiply(
                d_q, pairs, rows * B, in_rows, 1,
                of_head + C * 3 * E + E, units, in_units, 3 * E, B, PRECISION, BLOCK_K,
            )  # fmt: skip
            # Not taken off d_log_sum: of a sum that Triton 3.7 leaves in its threads over a loop
            # it forgets the sign.
            total = tl.zeros([BLOCK_M], tl.float32)
            for start in range(0, B, BLOCK_K):
                items = start + tl.arange(0, BLOCK_K)
                total += tl.sum(
                    tl.load(
                        pairs + rows[:, None] * B + items[None, :],
                        mask=in_rows[:, None] & (items < B)[None, :],
                        other=0.0,
                    ),
                    1,
                )
            d_log_sum = -total
    of_branch = d_branch
    if d_branch is not None:
        of_branch += head * head_dim
    if is_image:
        if TEXT == ITEM:
            d_v += load_head(of_branch, rows, in_rows, E, units, head_dim)
        own = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        if IMAGE > NOTHING:
            own = load_head(of_branch, rows + n_up_texts, in_rows, E, units, head_dim)
        if IMAGE == ITEM:
            d_v += own
        elif IMAGE == TEXTS:
            d_out = own
        elif IMAGE == BOTH:
            q = load_head(of_head, here, in_rows, 3 * E, units, head_dim) * scale
            k = load_head(of_head + E, here, in_rows, 3 * E, units, head_dim)
            v = load_head(of_head + 2 * E, here, in_rows, 3 * E, units, head_dim)
            out = load_head(attended + head * head_dim, here, in_rows, E, units, head_dim)
            log_sum = tl.load(lse + here * H + head, mask=in_rows, other=0.0)
            mine, others = shares(sum_of_products(q, k, 1) + (shift - log_sum))
            d_odds_own = mine * others * sum_of_products(own, v - out, 1)
            d_v += mine[:, None] * own
            d_out = others[:, None] * own
            d_q = d_odds_own[:, None] * k
            d_k += d_odds_own[:, None] * q
            d_log_sum = -d_odds_own
    elif TEXT == TEXTS:
        d_out = load_head(of_branch, rows, in_rows, E, units, head_dim)
    of_row = d_qkv + head * head_dim
    store_head(of_row, here, in_rows, 3 * E, units, head_dim, d_q)
    store_head(of_row + E, here, in_rows, 3 * E, units, head_dim, d_k)
    store_head(of_row + 2 * E, here, in_rows, 3 * E, units, head_dim, d_v)
    if attended is not None:
        store_head(d_attended + head * head_dim, here, in_rows, E, units, head_dim, d_out)
        out = load_head(attended + head * head_dim, here, in_rows, E, units, head_dim)
        constant = sum_of_products(out, d_out, 1) - d_log_sum
        tl.store(delta + here * H + head, constant, mask=in_rows)

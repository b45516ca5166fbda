"""What the kernels share: tiles of heads, scores, and the softmax over a range of keys.

Queries, keys and values are tuples of a tensor [items, tokens, HEADS, WIDTH] and its first three
strides. Of their rows, tokens of items end to end, the first is that of item ``first``; without
``tokens``, the number of an item's, all rows are that item's.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(x, offsets, inside, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [n, WIDTH] at ``offsets``, zeros where they are not ``inside``."""
    cols = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (cols < WIDTH)[None, :]
    return tl.load(x + offsets[:, None] + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(x, offsets, inside, tile, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (cols < WIDTH)[None, :]
    tl.store(x + offsets[:, None] + cols[None, :], tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_tokens(x, first, rows, tokens, head, inside, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head [n, WIDTH] of rows of x."""
    base = x[0] + first * x[1] + head * x[3]
    if tokens is None:
        offsets = rows.to(tl.int64) * x[2]
    else:
        offsets = (rows // tokens).to(tl.int64) * x[1] + (rows % tokens).to(tl.int64) * x[2]
    return load_tile(base, offsets, inside, WIDTH, BLOCK_D)


@triton.jit
def load_token(x, item, token, head, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head of one token, in fp32 [1, BLOCK_D]."""
    cols = tl.arange(0, BLOCK_D)
    base = x[0] + item * x[1] + tl.cast(token, tl.int64) * x[2] + head * x[3]
    return tl.load(base + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_softmax(constants, place, inside):
    """The rows' maximum and the reciprocal of their sum, or of other constants as many."""
    first = tl.load(constants[0] + place, mask=inside, other=0.0)
    return first, tl.load(constants[1] + place, mask=inside, other=0.0)


@triton.jit
def merge(most, total, scores):
    """(maximum, sum, factor of what was, weight of what comes) of a softmax with one key more."""
    higher = tl.maximum(most, scores)
    keep = tl.exp2(most - higher)
    p = tl.exp2(scores - higher)
    return higher, total * keep + p, keep, p


@triton.jit
def attend(
    q,
    out,
    top,
    total,
    k,
    v,
    first,
    begin,
    end,
    tokens,
    items,
    head,
    scale,
    shift,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Go on with an online softmax over keys begin ... end - 1; with tokens over one's item's.

    out [BLOCK_M, BLOCK_D] is not yet divided by ``total``. items: of the rows of q.
    """
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        seen = keys < end
        k_tile = load_tokens(k, first, keys, tokens, head, seen, WIDTH, BLOCK_D)
        v_tile = load_tokens(v, first, keys, tokens, head, seen, WIDTH, BLOCK_D)
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale + shift
        visible = seen[None, :]
        if tokens is not None:
            visible &= (keys // tokens)[None, :] == items[:, None]
        scores = tl.where(visible, scores, -float("inf"))
        most = tl.maximum(top, tl.max(scores, 1))
        about = tl.where(most == -float("inf"), 0.0, most)
        keep = tl.exp2(top - about)
        p = tl.exp2(scores - about[:, None])
        total = total * keep + tl.sum(p, 1)
        out = out * keep[:, None]
        out = tl.dot(p.to(v_tile.dtype), v_tile, out, input_precision=PRECISION)
        top = most
    return out, top, total


@triton.jit
def gradient_of_scores(
    q,
    d_out,
    delta,
    top,
    factor,
    k_tile,
    v_tile,
    visible,
    scale,
    shift,
    PRECISION: tl.constexpr,
    SUM_PRECISION: tl.constexpr,
):
    """The weights [BLOCK_M, BLOCK_N] and the gradient by the scores, in fp32."""
    scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale + shift
    p = tl.exp2(scores - top[:, None]) * factor[:, None]
    p = tl.where(visible, p, 0.0)
    by_p = tl.dot(d_out, tl.trans(v_tile.to(d_out.dtype)), input_precision=SUM_PRECISION)
    return p, p * (by_p - delta[:, None])

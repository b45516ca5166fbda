"""What the kernels share: tiles of heads, scores, and the softmax over a range of keys."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(x, offsets, inside, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [n, WIDTH] of one head at ``offsets``, zeros where they are not ``inside``."""
    cols = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (cols < WIDTH)[None, :]
    return tl.load(x + offsets[:, None] + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(x, offsets, inside, tile, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (cols < WIDTH)[None, :]
    tl.store(x + offsets[:, None] + cols[None, :], tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def token_offsets(rows, tokens, item_stride, token_stride):
    """Where token ``rows % tokens`` of item ``rows // tokens`` begins."""
    items = (rows // tokens).to(tl.int64)
    return items * item_stride + (rows % tokens).to(tl.int64) * token_stride


@triton.jit
def attend(
    q,
    out,
    top,
    total,
    k,
    v,
    k_item,
    k_token,
    v_item,
    v_token,
    begin,
    end,
    tokens,
    items,
    scale,
    shift,
    OWN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Go on with an online softmax over keys begin ... end - 1; with OWN each row's item's alone.

    out [BLOCK_M, BLOCK_D] is not yet divided by ``total``. items: of the rows.
    """
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        seen = keys < end
        k_tile = load_tile(k, token_offsets(keys, tokens, k_item, k_token), seen, WIDTH, BLOCK_D)
        v_tile = load_tile(v, token_offsets(keys, tokens, v_item, v_token), seen, WIDTH, BLOCK_D)
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale + shift
        if OWN:
            visible = seen[None, :] & ((keys // tokens)[None, :] == items[:, None])
        else:
            visible = seen[None, :] & (items >= 0)[:, None]
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

"""Philox4x32-10 dropout, the same mask in every backend."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def survivors(seed, rows, first, width, threshold, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """Whether dropout keeps t[rows, first : first + BLOCK] of t [M, width].

    Four columns share a Philox call. STREAM: 0 for h, 1 for the input of the down-projection.
    """
    group = first // 4 + tl.arange(0, BLOCK // 4)
    e = rows.to(tl.uint64)[:, None] * ((width + 3) // 4) + group.to(tl.uint64)[None, :]
    offset = tl.load(seed + 1).to(tl.uint64) + STREAM
    w0, w1, w2, w3 = tl.philox(
        tl.load(seed),
        e.to(tl.uint32),
        (e >> 32).to(tl.uint32),
        offset.to(tl.uint32),
        (offset >> 32).to(tl.uint32),
    )
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)) >= threshold

"""Which tile each kernel of the head takes."""

from __future__ import annotations

from typing import Any

import triton

# Of products: rows, columns, and steps of the sum.
ROWS, COLUMNS, STEPS, WARPS = 32, 32, 32, 4
# Of unit features, of which a program owns whole rows.
FEATURE_ROWS, FEATURE_COLUMNS = 16, 64
# Of attention.
QUERIES, KEYS = 32, 32
# Elements of a tile of pairs [texts, images, R], and its images.
PAIRS, PAIR_IMAGES, PAIR_WARPS = 8192, 8, 8
COSINE_TEXTS, COSINE_IMAGES = 32, 32
SUMS = 256


def block(n: int, least: int = 16) -> int:
    return max(least, int(triton.next_power_of_2(n)))


def pairs(r: int) -> dict[str, Any]:
    """The tile of pairs for this R."""
    block_r = block(r)
    images = PAIR_IMAGES if block_r <= 256 else PAIR_IMAGES // 2
    texts = min(max(PAIRS // block_r // images, 4), 32)
    return {"BLOCK_C": texts, "BLOCK_B": images, "BLOCK_R": block_r}

"""What a token sees, by which the adapter's output depends on the text, the image or the pair."""

from __future__ import annotations

import triton.language as tl

ABSENT = tl.constexpr(0)  # the adapter changes no such feature
NOTHING = tl.constexpr(1)
TEXTS = tl.constexpr(2)
ITEM = tl.constexpr(3)  # the one image of the item
BOTH = tl.constexpr(4)


def form(texts: float, item: float) -> int:
    """Of a token to whose scores with texts and with the image these are added."""
    blocked = -float("inf")
    return NOTHING.value + (texts > blocked) * 1 + (item > blocked) * 2

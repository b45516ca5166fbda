"""What a token sees, for the kernels."""

from __future__ import annotations

import triton.language as tl

from ...ops import multimodal_state

ABSENT = tl.constexpr(multimodal_state.ABSENT)
NOTHING = tl.constexpr(multimodal_state.NOTHING)
TEXTS = tl.constexpr(multimodal_state.TEXTS)
ITEM = tl.constexpr(multimodal_state.ITEM)
BOTH = tl.constexpr(multimodal_state.BOTH)

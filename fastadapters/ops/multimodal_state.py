"""What the Triton kernels of the multi-modal head keep for backward.

Here, and not with them, because the fake kernel has to know how large it is without Triton.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

# What a token sees, by which the adapter's output depends on the text, the image or the pair.
ABSENT, NOTHING, TEXTS, ITEM, BOTH = range(5)  # ABSENT: the adapter changes no such feature


def _sees(texts: float, item: float) -> int:
    """What a token sees to whose scores with texts and with the item's image these are added."""
    return NOTHING + (texts > -math.inf) + 2 * (item > -math.inf)


class Sizes(NamedTuple):
    """Of one call; c texts, b images, width e with h heads, r before the last layer."""

    c: int
    b: int
    d: int
    e: int
    h: int
    r: int
    down: int  # the hidden width of the down-sampler, 0 if it is one layer
    composed: bool  # two layers follow attention before the last
    text: int
    image: int

    @property
    def attends(self) -> tuple[bool, bool]:
        """Whether the attention of texts, of images over the texts is wanted."""
        return self.text in (BOTH, TEXTS), self.image in (BOTH, TEXTS)

    @property
    def up(self) -> tuple[int, int]:
        """Rows that the up-sampler is applied to: what texts become, and what images become."""
        texts = {TEXTS: self.c, NOTHING: self.c, ITEM: self.b}.get(self.text, 0)
        return texts, self.b if self.image != ABSENT else 0

    @property
    def others(self) -> int:
        """Rows that texts are compared with: the images, and what texts become that see one."""
        return 2 * self.b if self.text == ITEM else self.b


def sizes(of: Mapping[str, Any]) -> Sizes:
    """Of a call with these arguments, by their names in the schema."""
    text, image, adapt = of["text"], of["image"], of["adapt"]
    down, up = of["down_weight_2"], of["up_weight_2"]
    return Sizes(
        text.shape[0],
        image.shape[0],
        image.shape[1],
        of["out_weight"].shape[0],
        of["num_heads"],
        of["up_weight"].shape[0 if up is not None else 1],
        0 if down is None else down.shape[1],
        up is not None,
        ABSENT if adapt == 2 else _sees(of["bias_tt"], of["bias_ti"]),
        ABSENT if adapt == 1 else _sees(of["bias_it"], of["bias_ii"]),
    )


def _shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Of what is kept; texts come before images."""
    rows, up = s.c + s.b, sum(s.up)
    shapes: dict[str, tuple[int, ...]] = {
        "x": (rows, s.e),
        "qkv": (rows, 3 * s.e),
        "lengths": (rows, 3),  # of a feature, of what it becomes, and of their blend
        "features": (s.c + s.others, s.d),
        "similarity": (s.c, s.others),
    }
    if s.down:
        shapes |= {"down": (rows, s.down), "down_active": (rows, s.down)}
    if s.composed:
        shapes |= {"inner_weight": (s.r, s.e), "inner_bias": (s.r,)}
    if any(s.attends):
        shapes |= {"attended": (rows, s.e), "lse": (rows, s.h)}
    if s.image == BOTH:
        shapes["mixed"] = (s.b, s.e)
    if up:
        shapes |= {"z": (up, s.r), "u": (up, s.d)}
        if s.composed:
            shapes["e"] = (up, s.r)
    if s.text == BOTH:
        shapes |= {
            "gram": (s.r * s.r + s.r + 1,),
            "hidden": (rows, s.h * s.r),
            "products": (rows, s.r),
            "constants": (rows,),
            "odds": (s.h, s.c, s.b),
            "squares": (s.c, s.b),
            "text_dots": (s.c, s.b),
            "image_dots": (s.c, s.b),
        }
    if s.text == ITEM:
        shapes |= {"item_lengths": (s.b,), "item_dot": (s.b,)}
    return shapes


def _padded(shape: tuple[int, ...]) -> int:
    """The elements it takes, so that the next begins at 16 bytes."""
    return (math.prod(shape) + 3) // 4 * 4


def size(of: Mapping[str, Any]) -> int:
    """How many fp32 numbers are kept."""
    s = sizes(of)
    return sum(map(_padded, _shapes(s).values())) if s.b else 0


def views(state: Tensor, s: Sizes) -> dict[str, Tensor]:
    """The parts of a state by name."""
    parts, at = {}, 0
    for name, shape in _shapes(s).items():
        parts[name] = state[at : at + math.prod(shape)].view(shape)
        at += _padded(shape)
    return parts

"""The last steps of backward: what is launched for the gradients of the parameters."""

from __future__ import annotations

import triton
from torch import Tensor

from ...ops.multimodal_state import ITEM
from . import tiles
from .call import Call, empty
from .forward import activated
from .parameters import compose_kernel, projections_kernel, up_kernel

Kept = dict[str, Tensor]
Gradients = dict[str, Tensor | None]  # by the names of what they are of; None: not asked for


def blends_text(c: Call) -> bool:
    """Whether texts are blended with what they become as rows of their own."""
    return c.s.up[0] > 0 and c.s.text != ITEM


def _named(gradients: Gradients, *names: str) -> list[Tensor | None]:
    return [gradients[name] for name in names]


def _any(*gradients: Tensor | None) -> bool:
    return any(gradient is not None for gradient in gradients)


def _blocks(n: int, k: int) -> int:
    """Tiles of a matrix [n, k]."""
    return triton.cdiv(n, tiles.COLUMNS) * triton.cdiv(k, tiles.COLUMNS)


def projections(c: Call, kept: Kept, made: Kept, gradients: Gradients, first_row: int) -> None:
    """The gradients of in_proj and of the down-sampler."""
    of, s = c.of, c.s
    wanted = _named(
        gradients,
        *("down_weight", "down_bias", "down_weight_2", "down_bias_2", "in_weight", "in_bias"),
    )
    if not _any(*wanted):
        return

    def rows(t: Tensor | None) -> Tensor | None:
        """Of what was projected."""
        return None if t is None else t[first_row:]

    down, d_x = s.down or s.e, made.get("d_x")
    blocks = max(
        _blocks(down, s.d) * _any(*wanted[:2]),
        _blocks(s.e, down) * _any(*wanted[2:4]),
        _blocks(3 * s.e, s.e) * _any(*wanted[4:]),
    )
    projections_kernel[(blocks, 3)](
        *wanted,
        rows(made.get("d_down", d_x)),
        of["text"],
        of["image"],
        rows(d_x),
        rows(kept.get("down_active")),
        rows(made.get("d_qkv")),
        rows(kept["x"]),
        of["text"].stride(0),
        of["image"].stride(0),
        s.c - first_row,
        s.b,
        s.d,
        down,
        s.e,
        BLOCK=tiles.COLUMNS,
        **c.meta,
    )


def up(c: Call, kept: Kept, made: Kept, gradients: Gradients) -> None:
    """The gradients of out_proj and of the up-sampler, of blend and logit_scale."""
    of, s = c.of, c.s
    names = ("out_weight", "out_bias", "up_weight", "up_bias")
    last = _named(gradients, "up_weight_2", "up_bias_2") if s.composed else []
    composed = s.composed and _any(*_named(gradients, *names))
    if s.composed:
        d_inner = [empty(c, s.r, s.e), empty(c, s.r)] if composed else [None, None]
    else:
        d_inner, last = _named(gradients, *names[:2]), _named(gradients, *names[2:])
    wanted = [*d_inner, *last, *_named(gradients, "blend", "logit_scale")]
    if not _any(*wanted):
        return
    block_h = min(tiles.block(c.head_dim), tiles.COLUMNS)
    inner_blocks = triton.cdiv(s.r, tiles.COLUMNS) * s.h * triton.cdiv(c.head_dim, block_h)
    d_hidden, n_u = made.get("d_hidden"), sum(s.up)
    blocks = max(inner_blocks * _any(*d_inner), _blocks(s.d, s.r) * _any(*last), 1)
    up_kernel[(blocks, 3)](
        *wanted,
        d_hidden,
        made.get("d_z"),
        kept.get("attended"),
        kept["qkv"][:, 2 * s.e :],
        kept.get("mixed"),
        *c.last,
        kept["features"],
        made.get("d_gram"),
        activated(kept),
        made.get("d_u"),
        made["of_scalars"],
        made.get("blends") if n_u else None,
        0 if d_hidden is None else d_hidden.shape[1],
        s.c,
        s.b,
        s.up[0],
        n_u,
        made["of_scalars"].shape[0],
        0 if blends_text(c) else s.c,
        s.c + s.up[1],
        s.d,
        s.e,
        s.h,
        s.r,
        TEXT=s.text,
        IMAGE=s.image,
        BLOCK=tiles.COLUMNS,
        BLOCK_H=block_h,
        **c.meta,
    )
    if composed:
        compose_kernel[(_blocks(max(s.r, s.e), s.e), 2)](
            *d_inner,
            of["out_weight"],
            of["out_bias"],
            of["up_weight"],
            *_named(gradients, *names),
            s.e,
            s.r,
            BLOCK=tiles.COLUMNS,
            **c.meta | {"BLOCK_K": tiles.STEPS // 2},
        )

"""The forward pass: what is launched, on what."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ...ops.codes import DTYPES
from ...ops.multimodal_state import ABSENT, BOTH, ITEM, TEXTS, size, views
from ..launch import architecture, guard
from . import tiles
from .attention import attention_kernel
from .call import Call, call, linear
from .cosines import cosines_kernel
from .features import features_kernel
from .linear import weights_kernel
from .pairs import pairs_kernel, products_kernel

OF_PAIRS = ("squares", "text_dots", "image_dots")  # |u|^2, t.u, i.u


def inner(c: Call, kept: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Weight [R, E] and bias of the layer between attention and the last activation."""
    if c.s.composed:
        return kept["inner_weight"], kept["inner_bias"]
    return c.of["out_weight"], c.of["out_bias"]


def up_inputs(c: Call, kept: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """The attention outputs of the rows that the up-sampler is applied to; None: zeros."""
    s, e = c.s, c.s.e
    values = kept["qkv"][s.c :, 2 * e :]
    text = {TEXTS: kept.get("attended", values)[: s.c], ITEM: values}.get(s.text)
    attended = kept.get("attended", values)[s.c :]
    image = {BOTH: kept.get("mixed"), TEXTS: attended, ITEM: values}.get(s.image)
    return text, image


def _weights(c: Call, kept: dict[str, Tensor]) -> None:
    if not c.s.composed and c.s.text != BOTH:
        return
    of, s = c.of, c.s
    blocks = triton.cdiv(s.r, tiles.COLUMNS), triton.cdiv(max(s.r, s.e), tiles.COLUMNS), 2
    weights_kernel[blocks](
        of["out_weight"],
        of["out_bias"],
        of["up_weight"],
        of["up_bias"],
        *c.last,
        kept.get("inner_weight"),
        kept.get("inner_bias"),
        kept.get("gram"),
        s.d,
        s.e,
        s.r,
        BLOCK_N=tiles.COLUMNS,
        **c.meta,
    )


def _project(c: Call, kept: dict[str, Tensor]) -> None:
    """Down-sampler, queries, keys and values; of texts only where something attends to them."""
    of, s = c.of, c.s
    names = [("x", "down_weight", "down_bias")]
    if s.down:
        names = [("down", "down_weight", "down_bias"), ("x", "down_weight_2", "down_bias_2")]
    text, image = of["text"], of["image"]
    for name, weight, bias in (*names, ("qkv", "in_weight", "in_bias")):
        out = after = kept[name]
        active: tuple[Tensor | None, Tensor | None] = None, None
        if name == "down":
            after = kept["down_active"]
            active = after[: s.c], after[s.c :]
        linear(
            c, text, image, of[weight], of[bias],
            out[: s.c] if any(s.attends) else None, out[s.c :],
            active=active, activation=of["down_activation"],
        )  # fmt: skip
        text, image = after[: s.c], after[s.c :]


def _attend(c: Call, kept: dict[str, Tensor]) -> None:
    s = c.s
    texts, images = s.attends
    if not texts and not images:
        return
    n_texts, n_images = s.c * texts, s.b * images
    blocks = triton.cdiv(n_texts, tiles.QUERIES) + triton.cdiv(n_images, tiles.QUERIES)
    attention_kernel[(blocks, s.h)](
        kept["qkv"],
        kept["attended"],
        kept["lse"],
        kept.get("mixed"),
        c.image_shift,
        c.scale,
        n_texts,
        n_images,
        s.c,
        s.h,
        c.head_dim,
        BLOCK_M=tiles.QUERIES,
        BLOCK_N=tiles.KEYS,
        BLOCK_H=tiles.block(c.head_dim),
        PRECISION=c.meta["PRECISION"],
        num_warps=tiles.WARPS,
    )


def _hidden(c: Call, kept: dict[str, Tensor]) -> None:
    """What the layer behind attention makes: of each text and image by head, and of rows."""
    s = c.s
    weight, bias = inner(c, kept)
    values = kept["qkv"][s.c :, 2 * s.e :]
    if s.text == BOTH:
        hidden = kept["hidden"]
        out = hidden[: s.c], hidden[s.c :]
        linear(c, kept["attended"][: s.c], values, weight, bias, *out, heads=s.h)
    n_texts, n_images = s.up
    if n_texts + n_images:
        z, e = kept["z"], kept.get("e")
        out = z[:n_texts] if n_texts else None, z[n_texts:] if n_images else None
        active = (None, None) if e is None else (e[:n_texts], e[n_texts:])
        linear(
            c, *up_inputs(c, kept), weight, bias, *out, active=active, activation=c.activation
        )  # fmt: skip


def activated(kept: dict[str, Tensor]) -> Tensor | None:
    """What the last layer is applied to, of rows."""
    return kept.get("e", kept.get("z"))


def _features(c: Call, kept: dict[str, Tensor]) -> None:
    of, s = c.of, c.s
    n_texts, n_images = s.up
    e, u = activated(kept), kept.get("u")

    def part(t: Tensor | None, first: int, n: int, wanted: bool) -> Tensor | None:
        return t[first : first + n] if wanted and t is not None else None

    blends_text = n_texts > 0 and s.text != ITEM
    blocks = triton.cdiv(s.c, tiles.FEATURE_ROWS) + triton.cdiv(s.b, tiles.FEATURE_ROWS)
    features_kernel[(blocks,)](
        of["text"],
        of["image"],
        part(e, 0, n_texts, blends_text),
        part(e, n_texts, n_images, n_images > 0),
        part(e, 0, n_texts, s.text == ITEM),
        part(u, 0, n_texts, blends_text),
        part(u, n_texts, n_images, n_images > 0),
        part(u, 0, n_texts, s.text == ITEM),
        kept["lengths"],
        kept.get("item_lengths"),
        kept["features"],
        kept.get("item_dot"),
        *c.last,
        kept.get("products"),
        kept.get("constants"),
        *c.blend,
        s.c,
        s.b,
        s.d,
        s.r,
        of["text"].stride(0),
        of["image"].stride(0),
        RAW=s.text == ABSENT,
        BLOCK_M=tiles.FEATURE_ROWS,
        BLOCK_D=tiles.FEATURE_COLUMNS,
        **c.meta,
    )


def _logits(c: Call, kept: dict[str, Tensor], logits: Tensor, save: bool) -> None:
    s = c.s
    if s.text != BOTH:
        grid = triton.cdiv(s.c, tiles.COSINE_TEXTS), triton.cdiv(s.b, tiles.COSINE_IMAGES)
        cosines_kernel[grid](
            logits,
            kept["similarity"] if save else None,
            kept["features"],
            kept.get("item_dot"),
            kept.get("item_lengths"),
            kept["lengths"],
            *c.numbers,
            s.c,
            s.b,
            s.d,
            BLOCK_C=tiles.COSINE_TEXTS,
            BLOCK_B=tiles.COSINE_IMAGES,
            **c.meta,
        )
        return
    grid = triton.cdiv(s.c, tiles.ROWS), triton.cdiv(s.b, tiles.ROWS), s.h + 1
    products_kernel[grid](
        kept["similarity"],
        kept["odds"],
        kept["features"],
        kept["qkv"],
        kept["lse"],
        c.text_shift,
        c.scale,
        s.c,
        s.b,
        s.d,
        s.h,
        c.head_dim,
        BLOCK_C=tiles.ROWS,
        BLOCK_B=tiles.ROWS,
        BLOCK_H=tiles.block(c.head_dim),
        **c.meta,
    )
    tile = tiles.pairs(s.r)
    pairs_kernel[triton.cdiv(s.c, tile["BLOCK_C"]), triton.cdiv(s.b, tile["BLOCK_B"])](
        logits,
        *((kept[name] if save else None) for name in OF_PAIRS),
        kept["constants"],
        *c.last,
        kept["similarity"],
        kept["odds"],
        kept["hidden"],
        kept["products"],
        kept["lengths"],
        kept["gram"],
        *c.numbers,
        s.c,
        s.b,
        s.h,
        s.r,
        s.d,
        BLOCK_D=tiles.PAIR_COLUMNS,
        **pair_meta(c),
        **tiles.pair_registers(architecture()),
        **tile,
    )


def pair_meta(c: Call) -> dict[str, Any]:
    return {
        "ACTIVATION": c.activation,
        "PRECISION": c.meta["PRECISION"],
        "num_warps": tiles.PAIR_WARPS,
        "num_stages": 1,
    }


def multimodal_logits_forward(text: Tensor, image: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """``fastadapters::multimodal_logits_forward``."""
    *inputs, save = rest
    with guard(image.device):
        c = call(text, image, *inputs)
        s = c.s
        logits = image.new_empty((s.b, s.c), dtype=DTYPES[c.of["out_dtype"]])
        state = image.new_empty(size(c.of), dtype=torch.float32)
        if s.b:
            kept = views(state, s)
            _weights(c, kept)
            _project(c, kept)
            _attend(c, kept)
            _hidden(c, kept)
            _features(c, kept)
            _logits(c, kept, logits, save)
    return logits, state if save else image.new_empty(0, dtype=torch.float32)

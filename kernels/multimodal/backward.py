"""The backward pass: what is launched, on what."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...ops.multimodal import PARAMETERS, allocate_gradients
from ...ops.multimodal_state import ABSENT, BOTH, ITEM, views
from ..launch import architecture, guard, processors
from . import tiles
from .attention import heads_kernel, keys_kernel, queries_kernel
from .call import Call, call, empty, linear
from .cosines import d_cosines_kernel
from .d_features import d_features_kernel
from .d_pairs import d_pairs_kernel
from .forward import OF_PAIRS, inner, pair_meta
from .gradients import similarity_kernel, sums_kernel
from .parameter_launches import Gradients, Kept, blends_text, projections, up

NAMES = ("text", "image", *PARAMETERS)


class Wanted(NamedTuple):
    """Which steps the gradients asked for need, each with all before it."""

    similarity: bool  # gradients of the products of features
    texts: bool  # ... of those of texts
    up: bool  # gradients of what texts and images become
    inner: bool  # ... and of what the layer behind attention gives
    qkv: bool
    x: bool
    first: bool  # gradients behind the down-sampler's first layer


def _wanted(c: Call, gradients: Gradients) -> Wanted:
    def any_of(*names: str) -> bool:
        return any(gradients[name] is not None for name in names)

    s = c.s
    composed = ("up_weight", "up_bias") if s.composed else ()
    last = ("up_weight_2", "up_bias_2") if s.composed else ("up_weight", "up_bias")
    first = any_of("text", "image", "down_weight", "down_bias")
    x = first or any_of("down_weight_2", "down_bias_2")
    qkv = x or any_of("in_weight", "in_bias")
    inner_layer = qkv or any_of("out_weight", "out_bias", *composed)
    up = inner_layer or any_of(*last)
    blended = any_of("blend") and sum(s.up) > 0
    texts = any_of("text") or (blends_text(c) and (up or blended))
    return Wanted(up or blended, texts, up and sum(s.up) > 0, inner_layer, qkv, x, first)


def _sums(c: Call, *pairs: tuple[Tensor, Tensor]) -> None:
    """Of each parts [n, ...] the sum over n, to the other tensor."""
    none = (None, None)
    parts, outs = zip(*pairs, *[none] * (3 - len(pairs)), strict=True)
    sizes = [0 if out is None else out.numel() for out in outs]
    counts = [0 if part is None else part.shape[0] for part in parts]
    grid = triton.cdiv(max(sizes), tiles.SUMS), len(pairs)
    sums_kernel[grid](*parts, *outs, *counts, *sizes, BLOCK=tiles.SUMS)


def _pairs(c: Call, kept: Kept, d_logits: Tensor, wanted: Wanted) -> Kept:
    """d_similarity, of_scalars, and the sums over texts or images of the rest."""
    s = c.s
    grid = triton.cdiv(s.c, tiles.COSINE_TEXTS), triton.cdiv(s.b, tiles.COSINE_IMAGES)
    made = {
        "d_similarity": empty(c, s.c, s.others),
        "of_scalars": empty(c, grid[0] * grid[1], 2),
    }
    of_pairs = [kept.get(name) for name in OF_PAIRS]
    d_of_pairs = [None if t is None else torch.empty_like(t) for t in of_pairs]
    if s.text in (BOTH, ITEM):
        made["d_text_squares"] = empty(c, grid[1], s.c)
    of_images = empty(c, grid[0], s.b, 2) if s.text == ITEM else None
    d_cosines_kernel[grid](
        d_logits,
        kept["similarity"],
        *of_pairs,
        made["d_similarity"],
        *d_of_pairs,
        made.get("d_text_squares"),
        of_images,
        made["of_scalars"],
        kept.get("item_dot"),
        kept.get("item_lengths"),
        kept["lengths"],
        *c.numbers,
        s.c,
        s.b,
        BLOCK_C=tiles.COSINE_TEXTS,
        BLOCK_B=tiles.COSINE_IMAGES,
    )
    if of_images is not None and wanted.similarity:
        made["d_item_dot"] = empty(c, s.b, 2)
        _sums(c, (of_images, made["d_item_dot"]))
    if s.text != BOTH or not wanted.similarity:
        return made
    tile = tiles.d_pairs(s.r, architecture())
    text_tiles, image_tiles = triton.cdiv(s.c, tile["BLOCK_C"]), triton.cdiv(s.b, tile["BLOCK_B"])
    most = min(max(2 * processors(d_logits.device) // image_tiles, 1), tiles.GROUPS)
    each = triton.cdiv(text_tiles, most)
    grid = triton.cdiv(text_tiles, each), image_tiles
    width = (s.h + 1) * s.r + 1
    made["d_odds"] = empty(c, s.h, s.c, s.b)
    of_texts, of_images = empty(c, grid[1], s.c, width), empty(c, grid[0], s.b, width)
    of_weights = empty(c, grid[0] * grid[1], s.r * s.r + s.r + 1)
    d_pairs_kernel[grid](
        *d_of_pairs,
        made["d_odds"],
        of_texts,
        of_images,
        of_weights,
        kept["odds"],
        kept["hidden"],
        kept["products"],
        kept["gram"],
        s.c,
        s.b,
        s.h,
        s.r,
        width,
        each,
        **pair_meta(c),
        **tile,
    )
    made["d_hidden"] = empty(c, s.c + s.b, width)
    made["d_gram"] = empty(c, of_weights.shape[1])
    by_text, by_image = made["d_hidden"][: s.c], made["d_hidden"][s.c :]
    _sums(c, (of_texts, by_text), (of_images, by_image), (of_weights, made["d_gram"]))
    return made


def _features(c: Call, kept: Kept, made: Kept, wanted: Wanted, gradients: Gradients) -> Kept:
    """Gradients of features but for what the adapter adds, of what they become, of the blend."""
    of, s = c.of, c.s
    n_texts, n_images = s.up
    d_features = empty(c, s.c + s.others, s.d)
    d_hidden = made.get("d_hidden")
    d_products = d_constants = None
    if d_hidden is not None:
        d_products = d_hidden[:, s.h * s.r :]
        d_constants = d_products[:, s.r :]
    blocks = triton.cdiv(s.others, tiles.ROWS)
    if wanted.texts:
        blocks += triton.cdiv(s.c, tiles.ROWS)
    similarity_kernel[(blocks, triton.cdiv(s.d, tiles.COLUMNS))](
        d_features,
        made["d_similarity"],
        kept["features"],
        d_products,
        d_constants,
        *c.last,
        0 if d_hidden is None else d_hidden.shape[1],
        s.c,
        s.others,
        s.d,
        s.r,
        TEXTS=wanted.texts,
        BLOCK_M=tiles.ROWS,
        BLOCK_N=tiles.COLUMNS,
        **c.meta,
    )
    u = kept.get("u")
    d_u = torch.empty_like(u) if wanted.up and u is not None else None

    def part(t: Tensor | None, first: int, n: int, there: bool) -> Tensor | None:
        return t[first : first + n] if there and t is not None else None

    d_text, d_image = gradients["text"], gradients["image"]
    found = {}
    if any(s.attends) and d_text is not None:
        found["d_text"] = d_text = empty(c, s.c, s.d)
    if d_image is not None:
        found["d_image"] = d_image = empty(c, s.b, s.d)
    if gradients["blend"] is not None:
        found["blends"] = empty(c, s.c + s.b)
    if d_u is not None:
        found["d_u"] = d_u
    blends, images, d_squares = blends_text(c), n_images > 0, made.get("d_text_squares")
    blocks = triton.cdiv(s.c, tiles.FEATURE_ROWS) + triton.cdiv(s.b, tiles.FEATURE_ROWS)
    d_features_kernel[(blocks,)](
        d_features,
        kept["features"],
        of["text"],
        of["image"],
        part(u, 0, n_texts, blends),
        part(u, n_texts, n_images, images),
        part(d_u, 0, n_texts, blends),
        part(d_u, n_texts, n_images, images),
        kept["lengths"],
        d_text,
        d_image,
        found.get("blends"),
        made.get("d_item_dot"),
        kept.get("item_lengths"),
        part(d_u, 0, n_texts, s.text == ITEM),
        d_squares,
        0 if d_squares is None else d_squares.shape[0],
        *c.blend,
        s.c,
        s.b,
        s.d,
        of["text"].stride(0),
        of["image"].stride(0),
        TEXTS=wanted.texts,
        RAW=s.text == ABSENT,
        BLOCK_M=tiles.FEATURE_ROWS,
        BLOCK_D=tiles.FEATURE_COLUMNS,
    )
    return found


def _attention(c: Call, kept: Kept, made: Kept) -> Tensor:
    """The gradient of queries, keys and values [C + B, 3 E]."""
    s = c.s
    d_qkv, d_attended, delta = torch.empty_like(kept["qkv"]), None, None
    if any(s.attends):
        d_attended, delta = torch.empty_like(kept["attended"]), torch.empty_like(kept["lse"])
    d_hidden = made.get("d_hidden")
    heads = {"BLOCK_H": tiles.block(c.head_dim), "num_warps": tiles.WARPS}
    heads["PRECISION"] = c.meta["PRECISION"]
    blocks = triton.cdiv(s.c, tiles.ROWS) + triton.cdiv(s.b, tiles.ROWS)
    heads_kernel[(blocks, s.h)](
        kept["qkv"],
        kept.get("attended"),
        kept.get("lse"),
        d_hidden,
        made.get("d_odds"),
        made.get("d_branch"),
        inner(c, kept)[0],
        d_attended,
        delta,
        d_qkv,
        c.image_shift,
        c.scale,
        0 if d_hidden is None else d_hidden.shape[1],
        s.c,
        s.b,
        s.up[0],
        s.h,
        c.head_dim,
        s.r,
        TEXT=s.text,
        IMAGE=s.image,
        BLOCK_M=tiles.ROWS,
        BLOCK_K=tiles.STEPS,
        **heads,
    )
    if d_attended is None:
        return d_qkv
    texts, images = s.attends
    n_texts, n_images = s.c * texts, s.b * images
    common = (kept["qkv"], d_attended, kept["lse"], delta, d_qkv, c.scale)
    sizes = s.c, s.h, c.head_dim
    heads |= {"BLOCK_M": tiles.QUERIES, "BLOCK_N": tiles.KEYS}
    blocks = triton.cdiv(n_texts, tiles.QUERIES) + triton.cdiv(n_images, tiles.QUERIES)
    queries_kernel[(blocks, s.h)](*common, n_texts, n_images, *sizes, **heads)
    first, last = s.c - n_texts, s.c + n_images
    keys_kernel[(triton.cdiv(s.c, tiles.KEYS), s.h)](*common, first, last, *sizes, **heads)
    return d_qkv


def _backward(c: Call, kept: Kept, d_logits: Tensor, gradients: Gradients) -> None:
    of, s = c.of, c.s
    wanted = _wanted(c, gradients)
    made = _pairs(c, kept, d_logits, wanted)
    first_row = 0 if any(s.attends) else s.c  # of what was projected
    if wanted.similarity:
        made |= _features(c, kept, made, wanted, gradients)
    if wanted.up and wanted.inner:
        made["d_z"] = torch.empty_like(kept["z"])
        gate = {"gate": kept["z"], "gate_activation": c.activation} if s.composed else {}
        linear(
            c, made["d_u"], None, c.last[0], None, made["d_z"], None, transposed=True, **gate
        )  # fmt: skip
        if wanted.qkv:
            made["d_branch"] = empty(c, sum(s.up), s.e)
            weight = inner(c, kept)[0]
            linear(c, made["d_z"], None, weight, None, made["d_branch"], None, transposed=True)
    if wanted.qkv:
        made["d_qkv"] = _attention(c, kept, made)
    if wanted.x:
        made["d_x"] = torch.empty_like(kept["x"])
        d_in, d_out = made["d_qkv"][first_row:], made["d_x"][first_row:]
        linear(c, d_in, None, of["in_weight"], None, d_out, None, transposed=True)
    if wanted.first and s.down:
        made["d_down"] = torch.empty_like(kept["down"])
        linear(
            c, made["d_x"][first_row:], None, of["down_weight_2"], None,
            made["d_down"][first_row:], None, transposed=True,
            gate=kept["down"][first_row:], gate_activation=of["down_activation"],
        )  # fmt: skip
    if wanted.first:
        d_first = made["d_down" if s.down else "d_x"]
        for name, rows, part in (
            ("text", slice(s.c), "d_text"),
            ("image", slice(s.c, None), "d_image"),
        ):
            if part in made:
                linear(
                    c,
                    d_first[rows],
                    None,
                    of["down_weight"],
                    None,
                    gradients[name],
                    None,
                    transposed=True,
                    added=made[part],
                )
    projections(c, kept, made, gradients, first_row)
    up(c, kept, made, gradients)


def multimodal_logits_backward(
    d_logits: Tensor, text: Tensor, state: Tensor, image: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """``fastadapters::multimodal_logits_backward``."""
    *inputs, needs = rest
    tensors = (text, image, *inputs[: len(PARAMETERS)])
    found = allocate_gradients(tensors, needs)
    gradients: Gradients = {
        name: gradient if t is not None and needs >> i & 1 else None
        for i, (name, t, gradient) in enumerate(zip(NAMES, tensors, found, strict=True))
    }
    with guard(image.device):
        c = call(text, image, *inputs)
        if c.s.b == 0:
            for gradient in found:
                gradient.zero_()
        elif needs:
            _backward(c, views(state, c.s), d_logits.contiguous(), gradients)
    return found

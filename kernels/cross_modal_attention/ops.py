"""The ops: what is launched, on what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...ops.cross_modal_attention import (
    IMAGE,
    TEXT,
    allocate_forward,
    allocate_gradients,
    rows_of_state,
)
from ..launch import architecture, guard, precision, processors
from . import tiles
from .backward import image_queries_kernel, text_images_kernel, text_queries_kernel
from .forward import image_out_kernel, text_out_kernel, texts_kernel
from .keys import image_keys_kernel, text_keys_kernel

# Beyond this a difference of biases decides alone: the weaker block is as blocked.
_DECISIVE = 1e6


class Problem(NamedTuple):
    """What every launch of one call shares."""

    device: torch.device
    dtype: torch.dtype
    shared: bool  # whether the items have one set of texts
    groups: int  # of items that share texts
    items: int  # of all groups
    texts: int
    images: int
    heads: int
    width: int
    scale: float
    texts_see: tuple[bool, bool]  # texts, images
    images_see: tuple[bool, bool]
    shifts: tuple[float, float]  # of text and of image queries' scores with images, times log2(e)

    @property
    def n_rows(self) -> int:
        """Image queries of a group."""
        return self.items // max(self.groups, 1) * self.images

    @property
    def tile(self) -> tiles.Tile:
        return tiles.tile(self.dtype, self.width, architecture())

    @property
    def key_options(self) -> dict[str, int]:
        return tiles.key_options(self.dtype, self.tile, architecture())

    def single(self, sees: tuple[bool, bool]) -> bool:
        """Whether a query that sees these sees one key in all: no score has a gradient."""
        return sees[0] * self.texts + sees[1] * self.images == 1

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        if 0 in grid:
            return
        tile = self.tile
        meta |= {"HEADS": self.heads, "WIDTH": self.width, "BLOCK_D": tile.block_d}
        wanted = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "PRECISION": precision()}
        meta |= {name: value for name, value in wanted.items() if name in kernel.arg_names}
        if "SUM_PRECISION" in kernel.arg_names:  # of sums over items, in fp32 whatever the dtype
            tf32 = self.dtype != torch.float32 and torch.version.hip is None
            meta["SUM_PRECISION"] = "tf32" if tf32 else precision()
        multiplies = "PRECISION" in kernel.arg_names
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        if not multiplies:
            options["num_warps"] = tiles.warps_without_products(self.dtype, architecture())
        kernel[grid](*args, **options | meta)

    def blocks(self, n: int) -> int:
        return triton.cdiv(n, self.tile.block_m)


def _problem(text_q: Tensor, image_q: Tensor, scale: float, biases: Sequence[float]) -> Problem:
    items, images, heads, width = image_q.shape
    sees, shifts = [], []
    for with_texts, with_images in (biases[:2], biases[2:]):
        both = (with_texts > -math.inf, with_images > -math.inf)
        shift = with_images - with_texts if all(both) else 0.0
        if abs(shift) > _DECISIVE:
            both, shift = (shift < 0, shift > 0), 0.0
        sees.append(both)
        shifts.append(shift * math.log2(math.e))
    shared = text_q.dim() == 3
    return Problem(
        image_q.device, image_q.dtype, shared, 1 if shared else items, items, text_q.shape[-3],
        images, heads, width, scale, sees[0], sees[1], (shifts[0], shifts[1]),
    )  # fmt: skip


def _placed(*tensors: Tensor | None) -> list[tuple[Any, ...] | None]:
    """Each with its strides (item, token, head); what all items share has none over them."""
    return [None if t is None else (t, *(0,) * (4 - t.dim()), *t.stride()[:-1]) for t in tensors]


class State(NamedTuple):
    """Parts of the state: what texts make of texts, and the result of image queries.

    A softmax is its maximum and the reciprocal of its sum.
    """

    text_out: Tensor
    image_out: Tensor
    text_softmax: tuple[Tensor, Tensor]
    image_softmax: tuple[Tensor, Tensor]


def _state(p: Problem, state: Tensor) -> State:
    text, image = p.groups * p.texts * p.heads, p.items * p.images * p.heads
    sizes = (text * p.width, image * p.width, text, text, image, image)
    text_out, image_out, *constants = state[: sum(sizes)].split(sizes)
    return State(text_out, image_out, (constants[0], constants[1]), (constants[2], constants[3]))


def cross_modal_attention_forward(
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_q: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    scale: float,
    bias_tt: float,
    bias_ti: float,
    bias_it: float,
    bias_ii: float,
    outputs: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    p = _problem(text_q, image_q, scale, (bias_tt, bias_ti, bias_it, bias_ii))
    size = rows_of_state(text_q, image_q, ())
    text_out, image_out, state = allocate_forward(text_q, image_q, outputs, size if save else 0)
    scale *= math.log2(math.e)
    texts_first = bool(outputs & TEXT) and p.texts_see[0] and p.items > 0
    texts_saved = images_saved = (None, None)
    if save or texts_first:
        parts = _state(p, state if save else state.new_empty(size))
        texts_saved = (parts.text_out, parts.text_softmax)
        if save:
            images_saved = (parts.image_out, parts.image_softmax)
    with guard(p.device):
        if texts_first:
            p.launch(
                texts_kernel, (p.blocks(p.texts), p.heads, p.groups),
                *_placed(text_q, text_k, text_v), *texts_saved, p.texts, scale,
            )  # fmt: skip
        if outputs & TEXT:
            p.launch(
                text_out_kernel, (p.blocks(p.texts), p.heads, p.items),
                *_placed(text_q, image_k, image_v), text_out, *texts_saved, p.texts, p.images,
                scale, p.shifts[0], SHARED=p.shared, TEXTS=p.texts_see[0], IMAGES=p.texts_see[1],
            )  # fmt: skip
        if outputs & IMAGE:
            p.launch(
                image_out_kernel, (p.blocks(p.n_rows), p.heads, p.groups),
                *_placed(image_q, text_k, text_v, image_k, image_v), image_out, *images_saved,
                p.texts, p.images, p.n_rows, scale, p.shifts[1], TEXTS=p.images_see[0],
                IMAGES=p.images_see[1],
            )  # fmt: skip
    return text_out, image_out, state


class Sums(NamedTuple):
    """What `text_images_kernel` leaves."""

    d_texts: Tensor  # [splits + 1, groups, C, H, d], the last for the sum of the others
    d_delta: Tensor  # [splits + 1, groups, C, H]
    dq: Tensor  # [splits, groups, C, H, d]
    dk: Tensor  # [blocks, B, I, H, d]
    dv: Tensor


def _over_items(
    p: Problem, d_out: Tensor, tensors: Sequence[Tensor], parts: State, scale: float
) -> tuple[Sums, int, int]:
    """The gradients that texts leave for images and, summed over some items, for texts."""
    text_q, _, _, _, image_k, image_v = tensors
    blocks, items = p.blocks(p.texts), p.items // p.groups
    splits = min(max(2 * processors(p.device) // (blocks * p.heads * p.groups), 1), items)
    of_split = triton.cdiv(items, splits)
    splits = triton.cdiv(items, of_split)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=p.device)

    rows, images = p.groups * p.texts * p.heads, p.items * p.images * p.heads * p.texts_see[1]
    sums = Sums(
        empty(splits + 1, p.groups, p.texts * p.texts_see[0], p.heads, p.width),
        empty(splits + 1, rows * p.texts_see[0]),
        empty(splits, rows, p.width),
        *(empty(blocks, images, p.width) for _ in range(2)),
    )  # fmt: skip
    p.launch(
        text_images_kernel, (blocks, p.heads * p.groups, splits),
        *_placed(d_out, text_q, image_k, image_v), parts.text_out, parts.text_softmax, *sums,
        p.texts, p.images, items, of_split, scale, p.shifts[0], TEXTS=p.texts_see[0],
        IMAGES=p.texts_see[1], SINGLE=p.single(p.texts_see),
    )  # fmt: skip
    return sums, splits, blocks


def cross_modal_attention_backward(
    d_text_out: Tensor | None,
    d_image_out: Tensor | None,
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_q: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    state: Tensor,
    scale: float,
    bias_tt: float,
    bias_ti: float,
    bias_it: float,
    bias_ii: float,
    outputs: int,
    needs: int,
) -> tuple[Tensor, ...]:
    p = _problem(text_q, image_q, scale, (bias_tt, bias_ti, bias_it, bias_ii))
    tensors = (text_q, text_k, text_v, image_q, image_k, image_v)
    gradients = allocate_gradients(tensors, needs)
    d_text_q, d_text_k, d_text_v, d_image_q, d_image_k, d_image_v = (
        g if needs >> i & 1 else None for i, g in enumerate(gradients)
    )
    d_text_out, d_image_out = (
        d if d is None or d.stride(-1) == 1 else d.contiguous() for d in (d_text_out, d_image_out)
    )
    scores_scale = scale * math.log2(math.e)
    texts = d_text_out is not None and any(p.texts_see) and p.items > 0
    images = d_image_out is not None and any(p.images_see)
    parts = _state(p, state)
    sums, splits, blocks, delta = Sums(*(None,) * 5), 0, 0, None
    if d_text_q is not None and not texts:
        d_text_q.zero_()
    if d_image_q is not None and not images:
        d_image_q.zero_()
    with guard(p.device):
        if texts:
            sums, splits, blocks = _over_items(p, d_text_out, tensors, parts, scores_scale)
            p.launch(
                text_queries_kernel, (p.blocks(p.texts), p.heads, p.groups), sums.d_texts,
                sums.d_delta, sums.dq, *_placed(text_q, text_k, text_v), parts.text_softmax,
                d_text_q, p.texts, splits, scores_scale, scale, TEXTS=p.texts_see[0],
                SINGLE=p.single(p.texts_see),
            )  # fmt: skip
        if images:
            delta = torch.empty_like(parts.image_softmax[0])
            p.launch(
                image_queries_kernel, (p.blocks(p.n_rows), p.heads, p.groups),
                *_placed(d_image_out), parts.image_out,
                *_placed(image_q, text_k, text_v, image_k, image_v), parts.image_softmax, delta,
                d_image_q, p.texts, p.images, p.n_rows, scores_scale, p.shifts[1], scale,
                TEXTS=p.images_see[0], IMAGES=p.images_see[1], SINGLE=p.single(p.images_see),
            )  # fmt: skip
        by_texts = texts and p.texts_see[0]
        summed = (sums.d_texts[-1], sums.d_delta[-1]) if by_texts else (None, None)
        if d_text_k is not None or d_text_v is not None:
            p.launch(
                text_keys_kernel, (_key_blocks(p, p.texts), p.heads, p.groups),
                *_placed(summed[0]), summed[1], *_placed(d_image_out), delta,
                *_placed(text_q, image_q, text_k, text_v), parts.text_softmax,
                parts.image_softmax, d_text_k, d_text_v, p.texts, p.images, p.n_rows,
                scores_scale, scale, BY_TEXTS=by_texts, BY_IMAGES=images and p.images_see[0],
                SINGLE_TEXT=p.single(p.texts_see), SINGLE_IMAGE=p.single(p.images_see),
                **p.key_options,
            )  # fmt: skip
        if d_image_k is not None or d_image_v is not None:
            n_rows = p.items * p.images
            p.launch(
                image_keys_kernel, (_key_blocks(p, n_rows), p.heads), *_placed(d_image_out), delta,
                *_placed(image_q, image_k, image_v), parts.image_softmax, sums.dk, sums.dv,
                d_image_k, d_image_v, n_rows, p.images, blocks, scores_scale, p.shifts[1], scale,
                BY_TEXTS=texts and p.texts_see[1], BY_IMAGES=images and p.images_see[1],
                SINGLE=p.single(p.images_see), **p.key_options,
            )  # fmt: skip
    return gradients


def _key_blocks(p: Problem, n: int) -> int:
    return triton.cdiv(n, p.tile.block_n)

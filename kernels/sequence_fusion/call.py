"""One call of the op: its tensors and sizes, and how its kernels are launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...ops.codes import DTYPES
from ..launch import Tile, architecture, precision, triton_dtype
from . import tiles


def odd(numbers: Sequence[int]) -> tuple[int, ...]:
    """Numbers that change from call to call, as `even` takes them."""
    return tuple(2 * n + 1 for n in numbers)


def total(sizes: Sequence[int]) -> int:
    """Of a slab's elements: each slab begins on 16 bytes."""
    return -(-sum(sizes) // 4) * 4


def of_one_dtype(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The parameters contiguous, in fp32 if their dtypes differ: one kernel reads them all."""
    if len({t.dtype for t in tensors}) > 1:
        return tuple(t.float().contiguous() for t in tensors)
    return tuple(t.contiguous() for t in tensors)


class Problem(NamedTuple):
    """What every launch of one call shares."""

    xs: tuple[Tensor, ...]
    down_weights: tuple[Tensor, ...]
    time_factors: tuple[Tensor, ...]
    feature_factors: tuple[Tensor, ...]
    lengths: Tensor | None
    dtype: torch.dtype  # of the products
    items: int
    dim: int
    out_len: int
    rank: int  # of the sum after the product over the modalities
    time_ranks: int
    feature_ranks: int
    summed: bool
    tokens: tuple[int, ...]
    dims: tuple[int, ...]
    widths: tuple[int, ...]
    factor_tokens: tuple[int, ...]
    block_r: int
    padded_r: int

    @property
    def rank_out(self) -> int:
        return self.rank * self.out_len

    @property
    def rows(self) -> int:
        return self.items * self.out_len

    @property
    def products(self) -> int:
        """Elements of P."""
        return self.items * self.rank_out * sum(self.widths)

    def strides(self, dim: int) -> tuple[int, ...]:
        return tuple(x.stride(dim) for x in self.xs)

    def row_tile(self, kernel: Any) -> Tile:
        """Of rows of y and columns of D."""
        return tiles.tile(kernel.__name__, None, self.dim, self.block_r, self.dtype, architecture())

    def token_tile(self, kernel: Any) -> Tile:
        """Of tokens and columns of D_m; not by how many tokens there are: it decides what is summed
        in which order."""
        sizes = max(self.factor_tokens), max(self.dims), self.block_r
        return tiles.tile(kernel.__name__, *sizes, self.dtype, architecture())

    def launch(
        self, kernel: Any, grid: tuple[int, ...], tile: Tile, *args: Any, **meta: Any
    ) -> None:
        block_m, block_d, warps, stages = tile
        kernel[grid](
            *args,
            **meta,
            DTYPE=triton_dtype(self.dtype),
            PRECISION=precision(),
            R=self.padded_r,
            BLOCK_R=self.block_r,
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            num_warps=warps,
            num_stages=stages,
        )


def problem(
    inputs: Sequence[Tensor],
    down_weights: Sequence[Tensor],
    time_factors: Sequence[Tensor],
    feature_factors: Sequence[Tensor],
    lengths: Tensor | None,
    compute_dtype: int,
    summed: bool,
) -> Problem:
    dtype = DTYPES[compute_dtype]
    widths = tuple(w.shape[0] for w in down_weights)
    block_r = min(max(16, triton.next_power_of_2(max(widths))), tiles.max_block_r(dtype))
    time_ranks, _, out_len = time_factors[0].shape
    feature_ranks, _, dim = feature_factors[0].shape
    return Problem(
        xs=tuple(x if x.stride(-1) == 1 else x.contiguous() for x in inputs),
        down_weights=of_one_dtype(down_weights),
        time_factors=of_one_dtype(time_factors),
        feature_factors=of_one_dtype(feature_factors),
        lengths=None if lengths is None else lengths.contiguous(),
        dtype=dtype,
        items=inputs[0].shape[0],
        dim=dim,
        out_len=out_len,
        rank=1 if summed else time_ranks,
        time_ranks=time_ranks,
        feature_ranks=feature_ranks,
        summed=summed,
        tokens=tuple(x.shape[1] for x in inputs),
        dims=tuple(x.shape[2] for x in inputs),
        widths=widths,
        factor_tokens=tuple(a.shape[1] for a in time_factors),
        block_r=block_r,
        padded_r=triton.cdiv(max(widths), block_r) * block_r,
    )


def each_dtype(tensors: Sequence[Tensor]) -> list[tuple[tuple[Tensor, ...], list[bool]]]:
    """For each dtype among them: the tensors, another's in place of those that do not have it."""
    found = []
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        own = [t.dtype == dtype for t in tensors]
        stand_in = tensors[own.index(True)]
        found.append((tuple(t if o else stand_in for t, o in zip(tensors, own, strict=True)), own))
    return found

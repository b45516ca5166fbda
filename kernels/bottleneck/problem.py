"""What the launches of one call share."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...reference.philox import dropout_threshold
from ..launch import Tile, architecture, launch, precision, run, triton_dtype
from . import tiles
from .groups import Groups, make_groups
from .pre_activation import norm_kernel


class Dropout(NamedTuple):
    """One mask: the seed, None where nothing is dropped, what is kept times ``keep``."""

    seed: Tensor | None
    keep: float
    threshold: int


def dropout(seed: Tensor | None, p: float) -> Dropout:
    keep = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    return Dropout(seed if p > 0.0 else None, keep, dropout_threshold(p))


class Problem(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # of the products
    x_dtype: torch.dtype
    wide: bool  # whether x or y is in fp32
    m: int
    d: int
    d_out: int
    r: int
    block_r: int
    padded_r: int
    precision: str
    hidden: Dropout
    input: Dropout
    groups: Groups

    @property
    def sizes(self) -> tuple[int, int, int | None, int]:
        """M, D, D_out or None where it is D, which makes for shorter code, and r."""
        return self.m, self.d, None if self.d_out == self.d else self.d_out, self.r

    def tile(self, kernel: Any) -> Tile:
        d, in_front = max(self.d, self.d_out), self.input.seed is not None
        grouped = self.groups.order is not None
        key = d, self.block_r, self.dtype, self.wide, in_front, grouped, architecture()
        return tiles.tile(kernel.__name__, *key)

    def grouped(self, adapters: int, index: Tensor, kernel: Any, *splits: int) -> Problem:
        """With groups whose tiles are those of ``kernel``, and splits of so many rows."""
        block_m = self.tile(kernel).block_m
        return self._replace(groups=make_groups(index, adapters, self.m, block_m, *splits))

    def tiles(self, meta: dict[str, Any]) -> tuple[int, ...]:
        """The grid of a kernel of which each program takes a tile of rows."""
        table = self.groups.tiles.table
        return (triton.cdiv(self.m, meta["BLOCK_M"]) if table is None else len(table),)

    def per_channel(self, scale: Tensor | None) -> bool:
        return scale is not None and scale.numel() == self.groups.adapters * self.d_out

    def launch(self, kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        """Run ``kernel`` on a grid that may depend on BLOCK_M and BLOCK_D."""
        meta |= {"DTYPE": triton_dtype(self.dtype), "PRECISION": self.precision}
        meta |= {"R": self.padded_r, "BLOCK_R": self.block_r}
        if self.groups.order is None:
            launch(kernel, grid, functools.partial(self.tile, kernel), *args, **meta)
        else:  # whose tables are of a certain tile
            run(kernel, grid, self.tile(kernel), *args, **meta)

    def norm_products(
        self, down_weight: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None
    ) -> Tensor | None:
        """The sums over D of Wd gamma and of Wd beta, where LayerNorm is folded into products."""
        if norm_weight is None or self.input.seed is not None:
            return None
        shape = self.groups.adapters, 2, self.padded_r
        products = torch.empty(shape, dtype=torch.float32, device=self.device)
        norm_kernel[self.padded_r // tiles.NORM_BLOCK_R, self.groups.adapters](
            products,
            down_weight,
            norm_weight,
            norm_bias,
            self.groups.tiles.firsts,
            self.d,
            self.r,
            DTYPE=triton_dtype(self.dtype),
            X_DTYPE=triton_dtype(self.x_dtype),
            R=self.padded_r,
            BLOCK_R=tiles.NORM_BLOCK_R,
            BLOCK_D=tiles.NORM_BLOCK_D,
        )
        return products


def problem(
    rows: Tensor,
    x_dtype: torch.dtype,
    down_weight: Tensor,
    up_weight: Tensor,
    seed: Tensor | None,
    dropouts: tuple[float, float],
    dtype: torch.dtype,
) -> Problem:
    """Of y or dy, ``rows``; dropouts: of h and of the input of the down-projection."""
    (r, d), d_out = down_weight.shape[-2:], up_weight.shape[-2]
    block_r = min(max(16, triton.next_power_of_2(r)), tiles.max_block_r(dtype))
    return Problem(
        rows.device,
        dtype,
        x_dtype,
        torch.float32 in (x_dtype, rows.dtype),
        rows.numel() // d_out,
        d,
        d_out,
        r,
        block_r,
        triton.cdiv(r, block_r) * block_r,
        precision(),
        *(dropout(seed, p) for p in dropouts),
        Groups(),
    )

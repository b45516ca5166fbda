"""Which tile the kernels take."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton


class Tile(NamedTuple):
    """Queries, keys and the width of a tile, warps of a program, stages of its pipelined loads.

    A program that multiplies no tiles has `warps_without_products`.
    """

    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int


def tile(dtype: torch.dtype, width: int, arch: str) -> Tile:
    """By the dtype of the products and the head width d; AMD's warps are twice as wide.

    Up to d = 128 no registers spill: a backward program holds two tiles of keys and their two
    gradients. docs/triton-resources.md lists what each kernel takes.
    """
    block_d = max(16, triton.next_power_of_2(width))
    if dtype == torch.float32:
        return Tile(32, 32, block_d, 8, 2) if block_d <= 64 else Tile(16, 16, block_d, 8, 1)
    if block_d <= 64:
        return Tile(64, 32, block_d, 4 if arch.startswith("gfx") else 8, 2)
    return Tile(32, 16, block_d, 4, 2) if block_d <= 128 else Tile(16, 16, block_d, 8, 1)


def warps_without_products(dtype: torch.dtype, arch: str) -> int:
    """Of a program that multiplies no tiles; those of 16-bit inputs are twice as large.

    On sm_120 ptxas by itself keeps fewer registers than 4 warps need.
    """
    large = dtype != torch.float32 and not arch.startswith("gfx")
    return 8 if large or arch.startswith("sm_12") else 4


def key_options(dtype: torch.dtype, tile: Tile, arch: str) -> dict[str, int]:
    """Launch options of the kernels that own keys, where they are not the tile's.

    In fp32 they hold what they pipeline beside two products of its size, in all the registers there
    are; loaded as it is multiplied it takes a third of them, so that more programs hide the loads.
    For the newest GPUs ptxas by itself keeps 64 registers then, and spills.
    """
    if dtype != torch.float32 or tile.stages == 1:
        return {}
    newest = tile.block_d == 64 and arch.startswith(("sm_10", "sm_12"))
    return {"num_stages": 1} | ({"maxnreg": 128} if newest else {})

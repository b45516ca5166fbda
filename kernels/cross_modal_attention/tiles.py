"""Which tile the kernels take."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton


class Tile(NamedTuple):
    """Queries, keys and the width of a tile, warps of a program, stages of its pipelined loads."""

    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int


def tile(dtype: torch.dtype, width: int) -> Tile:
    """By the dtype of the products and the head width d.

    No registers spill: a backward program holds two tiles of keys and their two gradients.
    """
    block_d = max(16, triton.next_power_of_2(width))
    if block_d > 128:
        return Tile(16, 16, block_d, 4, 1)
    if block_d > 64 or dtype == torch.float32:
        return Tile(32, 32, block_d, 4, 1)
    return Tile(64, 64, block_d, 4, 2)

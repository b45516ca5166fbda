"""Which tile each kernel of the sequence fusion takes."""

from __future__ import annotations

import torch
import triton

from ..launch import Tile

# The tile of each kernel by the largest BLOCK_R that it is for. What was weighed: no spilled
# registers, whole 128-byte lines of x and dx, and enough loads of x in flight on a processor.
TILES = {
    "combine_kernel": {64: Tile(64, 64, 4, 3)},
    "fuse_kernel": {64: Tile(32, 64, 8, 2)},
    "factors_kernel": {32: Tile(32, 32, 4, 1), 64: Tile(16, 32, 4, 1)},
    "tokens_kernel": {32: Tile(64, 64, 4, 2), 64: Tile(64, 64, 8, 2)},
    "inputs_kernel": {64: Tile(32, 64, 4, 3)},
}
FLOAT32_TILES = {
    "combine_kernel": {32: Tile(32, 32, 4, 2)},
    "fuse_kernel": {32: Tile(16, 32, 4, 1)},
    "factors_kernel": {32: Tile(16, 16, 4, 1)},
    "tokens_kernel": {32: Tile(32, 32, 8, 1)},
    "inputs_kernel": {32: Tile(32, 32, 4, 2)},
}
# Of Hopper's newer tensor cores products by 8 warps spill under Triton 3.6 and 3.9.
HOPPER_TILES = TILES | {"fuse_kernel": {64: Tile(32, 64, 4, 2)}}
BLOCK_O = 16
REDUCE_BLOCK = 512


def max_block_r(dtype: torch.dtype) -> int:
    return 32 if dtype == torch.float32 else 64


def tile(
    kernel: str, rows: int | None, columns: int, block_r: int, dtype: torch.dtype, arch: str
) -> Tile:
    """The tile of a kernel, by its name, for so many columns, and rows if they do not vary."""
    sixteen = HOPPER_TILES if arch == "sm_90" else TILES
    tiles = (FLOAT32_TILES if dtype == torch.float32 else sixteen)[kernel]
    chosen = next(tile for most, tile in tiles.items() if block_r <= most)
    block_m = chosen.block_m
    if rows is not None:
        block_m = min(block_m, max(16, triton.next_power_of_2(rows)))
    block_d = min(chosen.block_d, max(16, triton.next_power_of_2(columns)))
    return chosen._replace(block_m=block_m, block_d=block_d)

"""Which tile each kernel of the sequence fusion takes."""

from __future__ import annotations

import torch
import triton

from ..launch import Tile

TILES = {
    "combine_kernel": Tile(64, 64, 4, 3),
    "fuse_kernel": Tile(32, 64, 4, 2),
    "factors_kernel": Tile(32, 32, 4, 1),
    "tokens_kernel": Tile(64, 64, 4, 2),
    "inputs_kernel": Tile(64, 128, 4, 3),
}
FLOAT32_TILES = {
    "combine_kernel": Tile(32, 32, 4, 2),
    "fuse_kernel": Tile(32, 32, 4, 1),
    "factors_kernel": Tile(16, 32, 4, 1),
    "tokens_kernel": Tile(32, 32, 4, 1),
    "inputs_kernel": Tile(32, 32, 4, 2),
}
BLOCK_O = 16
REDUCE_BLOCK = 1024


def max_block_r(dtype: torch.dtype) -> int:
    return 32 if dtype == torch.float32 else 64


def tile(kernel: str, rows: int, columns: int, dtype: torch.dtype, arch: str) -> Tile:
    """The tile of a kernel, by its name, for so many rows and columns on ``arch``."""
    chosen = (FLOAT32_TILES if dtype == torch.float32 else TILES)[kernel]
    block_m, block_d, _, _ = chosen
    return chosen._replace(
        block_m=min(block_m, max(16, triton.next_power_of_2(rows))),
        block_d=min(block_d, max(16, triton.next_power_of_2(columns))),
    )

"""Which tile each kernel of the bottleneck takes."""

from __future__ import annotations

import torch
import triton

from ..launch import Tile

# The tile of each kernel by the largest BLOCK_R that it is for. What was weighed: no spilled
# registers, two programs a processor for r <= 64 without LayerNorm and dropout, whole 128-byte
# lines, and that the rows of all resident programs fit the L2 cache (64 of D = 1024 in 16 bit:
# 128 KB a program). docs/triton-resources.md lists what each takes.
TILES = {
    "forward_kernel": {64: Tile(64, 64, 8, 3), 128: Tile(64, 64, 8, 2)},
    "backward_kernel": {64: Tile(64, 64, 8, 3), 128: Tile(64, 32, 16, 3)},
    "weights_kernel": {
        32: Tile(32, 128, 8, 3),
        64: Tile(64, 128, 8, 3),
        128: Tile(32, 128, 8, 3),
    },
}
# Before their columns are halved.
WIDE_TILES = TILES | {"weights_kernel": {128: Tile(32, 128, 8, 2)}}
# Hopper and datacentre Blackwell: products of at most 8 warps from shared memory, and an L2 so slow
# beside the HBM that the forward reads the weights for 128 rows at once.
WGMMA_TILES = TILES | {
    "forward_kernel": {32: Tile(64, 64, 8, 3), 128: Tile(128, 64, 8, 3)},
    "backward_kernel": {128: Tile(64, 64, 8, 3)},
    "weights_kernel": {128: Tile(64, 128, 8, 3)},
}
# Products of 16 warps would leave its tensor cores unused: fewer columns spare registers instead.
BLACKWELL_TILES = WGMMA_TILES | {
    "backward_kernel": {64: Tile(64, 64, 8, 3), 128: Tile(64, 32, 8, 3)},
}
# 64 KB of shared memory, and warps of 64 threads.
AMD_TILES = {
    "forward_kernel": {128: Tile(64, 64, 4, 2)},
    "backward_kernel": {64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 4, 2)},
    "weights_kernel": {128: Tile(64, 128, 4, 2)},
}
FLOAT32_TILES = {
    "forward_kernel": {64: Tile(32, 32, 8, 2)},
    "backward_kernel": {64: Tile(32, 32, 8, 2)},
    "weights_kernel": {64: Tile(32, 32, 4, 2)},
}
# With rows that are gathered 8 warps spill, and so do fp32 loads that are pipelined.
GROUPED_TILES = TILES | {"weights_kernel": TILES["weights_kernel"] | {64: Tile(64, 128, 16, 3)}}
GROUPED_FLOAT32_TILES = FLOAT32_TILES | {"backward_kernel": {64: Tile(32, 32, 8, 1)}}
REDUCE_BLOCK_D = 8
NORM_BLOCK_R = 4
NORM_BLOCK_D = 256


def max_block_r(dtype: torch.dtype) -> int:
    return 64 if dtype == torch.float32 else 128


def tile(
    kernel: str,
    d: int,
    block_r: int,
    dtype: torch.dtype,
    wide: bool,
    in_front: bool,
    grouped: bool,
    arch: str,
) -> Tile:
    """The tile of a kernel, by its name, on ``arch`` ("sm_90", "gfx942"); not by M.

    d is the wider of D and D_out. Where x or y is ``wide``, in fp32 beside 16-bit products, half
    the columns are as many bytes. Where there is dropout ``in_front`` its mask, and what LayerNorm
    wants of it, take registers, and so do ``grouped`` rows.
    """
    blackwell = arch.startswith("sm_10")
    if dtype == torch.float32:
        tiles = GROUPED_FLOAT32_TILES if grouped else FLOAT32_TILES
    elif arch.startswith("gfx"):
        tiles = AMD_TILES
    elif blackwell:
        tiles = BLACKWELL_TILES
    elif arch == "sm_90":
        tiles = WGMMA_TILES
    else:
        tiles = WIDE_TILES if wide else GROUPED_TILES if grouped else TILES
    chosen = next(tile for most, tile in tiles[kernel].items() if block_r <= most)
    columns, single = chosen.block_d, dtype == torch.float32
    crowded = {"weights_kernel", "backward_kernel"} if single or blackwell else {"weights_kernel"}
    if (wide and not single) or (in_front and kernel in crowded):
        columns = max(columns // 2, 16 if single else 32)
    stages = chosen.stages
    spills = blackwell and kernel in crowded
    spills |= arch == "sm_90" and wide and kernel == "backward_kernel"
    if in_front and not single and spills:
        stages = min(stages, 2)  # a third spills registers
    columns = min(columns, max(16, triton.next_power_of_2(d)))
    return chosen._replace(block_d=columns, stages=stages)


def reduce_warps(grouped: bool) -> int:
    """With the splits of one adapter of many 4 spill registers."""
    return 8 if grouped else 4

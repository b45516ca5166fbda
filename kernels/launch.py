"""What launches share: tiles, the architecture, tuning."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """Rows and columns of a kernel's tile, warps of a program, stages of its pipelined loads."""

    block_m: int
    block_d: int
    warps: int
    stages: int


@functools.cache
def _architecture(index: int) -> str:
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def architecture() -> str:
    """Of the current device, as in "sm_90" or "gfx942"; the oldest for Triton's interpreter."""
    if triton.knobs.runtime.interpret:
        return "sm_80"
    return _architecture(triton.runtime.driver.active.get_current_device())


@functools.cache
def processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _tuned(kernel: Any) -> Any:
    """``kernel`` choosing its tile by timing, once for each D, R and dtypes; kept on disk."""
    tiles = itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
    configs = [
        triton.Config({"BLOCK_M": m, "BLOCK_D": d}, num_warps=warps, num_stages=stages)
        for m, d, warps, stages in tiles
    ]
    return triton.autotune(configs, key=["D", "R", "DTYPE"], cache_results=True)(kernel)


def run(kernel: Any, grid: Any, tile: Tile, *args: Any, **meta: Any) -> None:
    """Run ``kernel`` with a tile on ``grid``, which may depend on its BLOCK_*."""
    block_m, block_d, warps, stages = tile
    kernel[grid](
        *args, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=warps, num_stages=stages, **meta
    )


def launch(kernel: Any, grid: Any, tile: Callable[[], Tile], *args: Any, **meta: Any) -> None:
    """`run` with ``tile()``, or under tuning with the fastest."""
    if os.environ.get("FASTADAPTERS_AUTOTUNE", "0") == "1":
        _tuned(kernel)[grid](*args, **meta)
    else:
        run(kernel, grid, tile(), *args, **meta)


def precision() -> str:
    """Of products of fp32 tiles, as PyTorch's setting allows."""
    tf32 = torch.get_float32_matmul_precision() != "highest" and torch.version.hip is None
    return "tf32" if tf32 else "ieee"


def triton_dtype(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


def guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the tensors' device the current one."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]

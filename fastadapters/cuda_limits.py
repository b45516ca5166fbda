"""Which sizes the kernels for GPUs take: what a block of the CUDA kernels holds must fit its shared
memory, grids and 32-bit indices must do. Beyond, `auto` runs `eager`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Bytes of shared memory that a block may have, by compute capability.
SHARED_MEMORY = {
    (8, 0): 166_912,
    (8, 6): 101_376,
    (8, 7): 166_912,
    (8, 9): 101_376,
    (9, 0): 232_448,
    (10, 0): 232_448,
    (10, 3): 232_448,
    (12, 0): 101_376,
    (12, 1): 101_376,
}

# Of a stack: each may have a block of the weight pass beside what others have, of 65535.
MOST_ADAPTERS = 60_000

_LINE = 128
_PANEL = 64 * _LINE
_TABLES = 3072


def shared_bytes(
    r: int, compute_dtype: torch.dtype, x_dtype: torch.dtype, out_dtype: torch.dtype, extra_x: bool
) -> int:
    """The least bytes of shared memory that a block of the bottleneck takes.

    h of 64 rows must fit; the sizes are those of ``Layout`` in csrc/cuda/bottleneck/walk.cuh.

    Args:
        extra_x: whether x is read once more, by a backward that makes dx through a LayerNorm.
    """
    size, x_size, y_size = (t.itemsize for t in (compute_dtype, x_dtype, out_dtype))
    width = 32 if r <= 32 and max(x_size, y_size) <= size else 64
    hidden_panels = -(-width * size // _LINE)
    weights = max(width * _LINE, hidden_panels * _LINE // size * _LINE)
    x = max(x_size // size, 1) * _PANEL
    slot = max(x, y_size // size * _PANEL)
    hidden = -(-r // width) * hidden_panels * _PANEL
    return 2 * (slot + weights + (x if extra_x else 0)) + hidden + _TABLES


def cuda_fits(
    r: int,
    compute_dtype: torch.dtype,
    x_dtype: torch.dtype,
    out_dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    norm: bool = True,
) -> bool:
    """Whether the bottleneck's CUDA kernels take this r, forward and backward.

    Args:
        capability: of the GPU, such as (9, 0); of one unknown the least is expected.
        norm: whether there is a LayerNorm in front.
    """
    limit = SHARED_MEMORY.get(capability, min(SHARED_MEMORY.values()))
    return shared_bytes(r, compute_dtype, x_dtype, out_dtype, norm) <= limit


_LARGEST = 2**31 - 1


def grouped_refusal(adapters: int, entries: int, columns: int) -> str | None:
    """Why neither the CUDA nor the Triton kernels take rows of so many adapters; None if they do.

    Args:
        entries: of the index, which is counted in blocks of 64.
        columns: the most of x, y and h.
    """
    if adapters > MOST_ADAPTERS:
        return f"N = {adapters} adapters are too many for it: at most {MOST_ADAPTERS}"
    if any((adapters + 1) * n > _LARGEST for n in (columns, entries // 64 + 1)):
        return f"{adapters} adapters for {entries} items are beyond its 32-bit indices"
    return None


def head_refusal(sizes: Sequence[int], capability: tuple[int, int]) -> str | None:
    """Why the CUDA kernels of the multi-modal head do not take these sizes; None if they do.

    Args:
        sizes: texts; images; numbers of one of them that lie side by side: features, q, k, v,
            hidden; heads; width of them all; width before the last layer.
        capability: of the GPU.
    """
    texts, items, row, heads, width, rank = sizes
    parts = -(-(width // heads) // 32)  # of d, as in csrc/cuda/multimodal/attention.cuh
    taken = 4 * ((2 * parts + 12) * 32 * 36 + 256)
    if taken > SHARED_MEMORY.get(capability, min(SHARED_MEMORY.values())):
        return f"heads {width // heads} wide are too large for the shared memory of this GPU"
    too_many = (texts + items) * row > _LARGEST or texts * items > _LARGEST // 4
    if too_many or heads * rank > _LARGEST // 64 or heads > 65535:
        return f"{texts} texts and {items} images are beyond its 32-bit indices"
    return None


def attention_refusal(width: int) -> str | None:
    """Why the CUDA kernels of cross-modal attention do not take heads of d ``width``; or None.

    Up to 128 their tiles fit the shared memory of every GPU.
    """
    return f"heads of d = {width} are too wide for it: 128" if width > 128 else None


def fusion_refusal(sizes: Sequence[int]) -> str | None:
    """Why the CUDA kernels of the sequence fusion do not take these sizes; None if they do.

    Args:
        sizes: the most tokens of all items together, of a modality or of the result; the most
            columns.
    """
    rows, columns = sizes
    if rows > _LARGEST - 64 or columns > _LARGEST // 8:
        return f"{rows} rows of {columns} are beyond its 32-bit indices"
    return None

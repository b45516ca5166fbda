"""Philox4x32-10 (Salmon et al., SC'11): the dropout stream, the same bits in every backend."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, for 32-bit values held in int64 (b in halves: no overflow)."""
    high = (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16
    return high & _MASK, (a * b) & _MASK


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> Tensor:
    """Ten rounds of Philox4x32 over int64 tensors that hold 32-bit words; returns [..., 4]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _mulhilo(_MULTIPLIERS[0], c0)
        high1, low1 = _mulhilo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def random_bits(seed: Tensor, rows: int, cols: int) -> Tensor:
    """Uniform 32-bit words as int64 [rows, cols], a function of (seed, row, column) alone.

    ``seed``: int64 [2] = (key, offset). With e = row * ceil(cols / 4) + column // 4 the counter is
    (e, offset), 64 bits each, low word first, and the word taken is number column % 4.
    """
    groups = -(-cols // 4)
    e = torch.arange(rows * groups, dtype=torch.int64, device=seed.device)
    key, offset = seed[0], seed[1]
    words = philox4x32(
        (e & _MASK, (e >> 32) & _MASK, offset & _MASK, (offset >> 32) & _MASK),
        (key & _MASK, (key >> 32) & _MASK),
    )
    return words.reshape(rows, 4 * groups)[:, :cols]


def dropout_threshold(p: float) -> int:
    """An element is dropped iff its 32-bit word is below this."""
    return min(round(p * 2**32), 2**32 - 1)


def input_stream(seed: Tensor) -> Tensor:
    """The seed of the mask of a bottleneck's input, beside ``seed`` of that of its h."""
    return seed + torch.arange(2, device=seed.device)


def dropout_multiplier(seed: Tensor, rows: int, cols: int, p: float, dtype: torch.dtype) -> Tensor:
    """0 for dropped elements, 1 / (1 - p) for kept ones: [rows, cols] in ``dtype``."""
    kept = random_bits(seed, rows, cols) >= dropout_threshold(p)
    return kept.to(dtype) * (1.0 / (1.0 - p) if p < 1.0 else 0.0)


def drop(t: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Dropout of the rows of t [..., C]: the mask is PyTorch's own where there is no ``seed``."""
    if p == 0.0:
        return t
    if seed is None:
        return F.dropout(t, p)
    rows, columns = math.prod(t.shape[:-1]), t.shape[-1]
    return t * dropout_multiplier(seed, rows, columns, p, t.dtype).reshape(t.shape)

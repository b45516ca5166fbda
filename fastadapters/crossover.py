"""Up to which sizes each kernel beats `eager`: the table that `auto` decides by.

Written by ``python -m benches.crossover``: measured for the CPU it runs on, computed for GPUs by
the model of docs/performance.md. The entry "other" is for what has none of its own. The number of
rows is no part of it: a kernel's lead in passes over memory and its lag in arithmetic both grow
with M, and a batch of another size runs on the same backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Limit(NamedTuple):
    """The largest sizes with which a kernel is at least as fast, forward and training step."""

    width: int
    """r: beyond it arithmetic is all that counts, and the vendor's matrix products are faster"""
    weight: int
    """D * r: beyond it the weights leave the cache in which a tile of rows meets them"""
    source: str

    def exceeded(self, d: int, r: int) -> str | None:
        """Why `eager` is faster at these sizes; None where it is not."""
        if r > self.width:
            return (
                f"r = {r}: products of this width are compute-bound; eager is faster"
                f" beyond r = {self.width}"
            )
        if d * r > self.weight:
            return (
                f"D = {d}, r = {r}: the weights are too large for the cache; eager is faster"
                f" beyond D * r = {self.weight}"
            )
        return None


# (op, device, instruction set or architecture, compute dtype). The dtypes of x and of the result do
# not matter: where x is float32 beside 16-bit products, eager has one pass more than without.
# fmt: off
LIMITS: dict[tuple[str, str, str, torch.dtype], Limit] = {
    ("bottleneck", "cpu", "amx", torch.bfloat16): Limit(
        256, 262144, "reckoned from a prototype, D = 768: r 64 2.5"),
    ("bottleneck", "cpu", "avx2", torch.bfloat16): Limit(
        4096, 4194304, "Zen 3, busy: measured up to r 768 (2.4 and more), beyond reckoned"),
    ("bottleneck", "cpu", "avx2", torch.float16): Limit(
        4096, 4194304, "Zen 3, busy: measured up to r 768 (2.4 and more), beyond reckoned"),
    ("bottleneck", "cpu", "avx2", torch.float32): Limit(
        128, 262144, "Zen 3, busy: chosen by hand from measured points"),
    ("bottleneck", "cpu", "avx512", torch.bfloat16): Limit(
        256, 262144, "reckoned from float32, which multiplies as fast"),
    ("bottleneck", "cpu", "avx512", torch.float16): Limit(
        256, 262144, "reckoned from float32, which multiplies as fast"),
    ("bottleneck", "cpu", "avx512", torch.float32): Limit(
        128, 262144, "measured, Intel without AMX, D = 768: r 256 1.05 and 0.88"),
    ("bottleneck", "cpu", "avx512_bf16", torch.bfloat16): Limit(
        128, 524288, "measured: Zen 4, PyTorch 2.13.0, D 768 r 64 1.05, r 256 0.99"),
    ("bottleneck", "cpu", "other", torch.bfloat16): Limit(
        256, 262144, "as portable"),
    ("bottleneck", "cpu", "other", torch.float16): Limit(
        256, 262144, "as portable"),
    ("bottleneck", "cpu", "other", torch.float32): Limit(
        8, 32768, "as portable"),
    ("bottleneck", "cpu", "portable", torch.bfloat16): Limit(
        256, 262144, "Zen 3, busy: measured at D 768 up to r 256, 128 rows"),
    ("bottleneck", "cpu", "portable", torch.float16): Limit(
        256, 262144, "Zen 3, busy: measured at D 768 up to r 256, 128 rows"),
    ("bottleneck", "cpu", "portable", torch.float32): Limit(
        8, 32768, "Zen 3, busy: by hand; without a residual r 8 lost (0.87 to 1.0)"),
    ("bottleneck", "cuda", "other", torch.bfloat16): Limit(
        128, 524288, "model: the least of three GPUs"),
    ("bottleneck", "cuda", "other", torch.float16): Limit(
        128, 524288, "model: the least of three GPUs"),
    ("bottleneck", "cuda", "other", torch.float32): Limit(
        16, 65536, "reckoned: without tensor cores arithmetic binds earlier"),
    ("bottleneck", "cuda", "sm_80", torch.bfloat16): Limit(
        256, 524288, "model: A100 SXM 80 GB"),
    ("bottleneck", "cuda", "sm_80", torch.float16): Limit(
        256, 524288, "model: A100 SXM 80 GB"),
    ("bottleneck", "cuda", "sm_89", torch.bfloat16): Limit(
        256, 524288, "model: RTX 4090"),
    ("bottleneck", "cuda", "sm_89", torch.float16): Limit(
        256, 524288, "model: RTX 4090"),
    ("bottleneck", "cuda", "sm_90", torch.bfloat16): Limit(
        128, 524288, "model: H100 SXM"),
    ("bottleneck", "cuda", "sm_90", torch.float16): Limit(
        128, 524288, "model: H100 SXM"),
    ("sequence_fusion", "cpu", "avx2", torch.bfloat16): Limit(
        4096, 4194304, "Zen 3, busy: measured up to r 64 (5 and more), beyond reckoned"),
    ("sequence_fusion", "cpu", "avx2", torch.float16): Limit(
        4096, 4194304, "reckoned from bfloat16"),
    ("sequence_fusion", "cpu", "avx2", torch.float32): Limit(
        128, 131072, "Zen 3, busy: r 128 1.1 and 1.1, r 256 1.1 and 1.0 at D 256, 768"),
    ("sequence_fusion", "cpu", "avx512", torch.float32): Limit(
        128, 131072, "reckoned from avx2"),
    ("sequence_fusion", "cpu", "avx512_bf16", torch.bfloat16): Limit(
        64, 98304, "Zen 4, by hand: D 768 r 64 1.3 and 1.1, r 128 1.1 and 0.96"),
    ("sequence_fusion", "cpu", "other", torch.bfloat16): Limit(
        64, 131072, "reckoned"),
    ("sequence_fusion", "cpu", "other", torch.float16): Limit(
        64, 131072, "reckoned"),
    ("sequence_fusion", "cpu", "other", torch.float32): Limit(
        16, 12288, "as portable"),
    ("sequence_fusion", "cpu", "portable", torch.float32): Limit(
        16, 12288, "Zen 3, busy: D 768 r 8 1.9 and 1.15, r 64 0.7; D 40 r 64 1.0"),
    ("sequence_fusion", "cuda", "other", torch.bfloat16): Limit(
        64, 262144, "x is read once up to r 64, for each 64 columns of r beyond"),
    ("sequence_fusion", "cuda", "other", torch.float16): Limit(
        64, 262144, "x is read once up to r 64, for each 64 columns of r beyond"),
    ("sequence_fusion", "cuda", "other", torch.float32): Limit(
        32, 131072, "reckoned, as of the bottleneck: arithmetic binds earlier"),
}
# fmt: on

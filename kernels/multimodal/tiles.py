"""Which tile each kernel of the head takes."""

from __future__ import annotations

import triton

# Of products: rows, columns, and steps of the sum.
ROWS, COLUMNS, STEPS, WARPS = 32, 32, 32, 4
# Of unit features, of which a program owns whole rows.
FEATURE_ROWS, FEATURE_COLUMNS = 16, 32
# Of attention.
QUERIES, KEYS = 32, 32
# Elements of a tile of pairs [texts, images, R], forward and backward, warps, and units of a
# product's sum. What was weighed is that no registers spill.
PAIRS, D_PAIRS, PAIR_WARPS, PAIR_UNITS = 2048, 2048, 8, 32
FEWER_D_PAIRS = 1024  # before sm_90, and on AMD
PAIR_COLUMNS = 16  # of u, where it is formed
REGISTERS = 168  # of a thread, see `registers`
GROUPS = 32  # the most programs that share the texts of a tile of images
COSINE_TEXTS, COSINE_IMAGES = 32, 32
SUMS = 256


def block(n: int, least: int = 16) -> int:
    return max(least, int(triton.next_power_of_2(n)))


def pairs(r: int) -> dict[str, int]:
    """The tile of pairs of the forward, for this R."""
    return _pairs(r, PAIRS // 2 if block(r) == 64 else PAIRS, 8)


def registers(arch: str) -> dict[str, int]:
    """The most registers of a thread of products, where to say so.

    For Blackwell ptxas keeps fewer by itself, to have more programs on a processor, and spills.
    """
    return {"maxnreg": REGISTERS} if arch.startswith(("sm_10", "sm_12")) else {}


def pair_registers(arch: str) -> dict[str, int]:
    """The same of the forward's pairs: beside some versions of Triton for Hopper as well."""
    return {"maxnreg": 128} if arch == "sm_90" else registers(arch)


def d_pairs(r: int, arch: str) -> dict[str, int]:
    """The tile of pairs of backward, for this R."""
    fewer = arch in ("sm_80", "sm_86", "sm_89") or arch.startswith("gfx")
    return _pairs(r, FEWER_D_PAIRS if fewer else D_PAIRS, 16)


def _pairs(r: int, elements: int, images: int) -> dict[str, int]:
    """A tile of that many elements and images, or fewer; of 16 pairs at least."""
    block_r = block(r)
    pairs = max(elements // block_r, 16)
    images = min(images, pairs)
    return {
        "BLOCK_C": pairs // images,
        "BLOCK_B": images,
        "BLOCK_R": block_r,
        "BLOCK_K": min(block_r, PAIR_UNITS) if block_r <= 64 else 16,
    }

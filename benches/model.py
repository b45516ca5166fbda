"""What the CUDA kernels should take on GPUs that this machine need not have.

    python -m benches.model                  # prints the predictions of docs/performance.md anew
    python -m benches.model multimodal       # ... of the head alone, or of another op

What the ops share; model_<op>.py has each of them. Counts are exact: the kernels run on the PTX
machine (tests/gpu). Rates are the data sheets' where those can be reached.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastadapters

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "gpu"), str(ROOT / "tests")]
OPS = ["bottleneck", "sequence_fusion", "multimodal", "cross_modal_attention"]
PAGE = ROOT / "docs" / "performance.md"
# PTX that no instruction of the machine code stands for.
FREE = ("ld.param", "mov", "cvta", "bra.uni")


class Gpu(NamedTuple):
    name: str
    arch: int
    processors: int
    clock: float  # Hz
    memory: float  # bytes/s
    l2: float  # bytes/s
    l2_size: float
    tensor: float  # FLOP/s of mma.sync, bf16 with fp32 sums
    vendor: float  # of the vendor's products: bf16, and fp32 without tensor cores
    vendor_fp32: float


GPUS = [
    Gpu("A100 SXM 80 GB", 80, 108, 1.41e9, 2.04e12, 4.5e12, 40 << 20, 312e12, 312e12, 19.5e12),
    Gpu("H100 SXM", 90, 132, 1.755e9, 3.35e12, 6.4e12, 50 << 20, 0.62 * 989e12, 989e12, 67e12),
    Gpu("RTX 4090", 89, 128, 2.52e9, 1.008e12, 5.0e12, 72 << 20, 165e12, 165e12, 82.6e12),
]


@dataclass
class Counts:
    """Of one kernel: bytes, products, and what the processors do."""

    read: float  # bytes asked of the L2 cache
    written: float
    distinct: float  # bytes among them
    again: float  # bytes of activations asked for a second time
    flops: float
    instructions: float
    wavefronts: float
    resident: float  # bytes of activations that the blocks under way come back to
    fma: float  # instructions among them that sm_80 issues at half the rate

    def times(self, gpu: Gpu) -> dict[str, float]:
        # What is asked for again is in the L2 cache if it holds that of all blocks; outputs, stored
        # with an evict-first hint, leave it before.
        kept = gpu.processors * self.resident <= gpu.l2_size
        cycles = gpu.processors * gpu.clock
        return {
            "memory": (self.distinct + (0 if kept else self.again)) / gpu.memory,
            "L2": max(self.read, self.written) / gpu.l2,
            "tensor": self.flops / gpu.tensor,
            "issue": (self.instructions + (self.fma if gpu.arch == 80 else 0)) / (4 * cycles),
            "shared": self.wavefronts / cycles,
        }


def counted(report: Any, again: float = 0, resident: float = 0) -> Counts:
    """Of one launch on the PTX machine."""
    traffic = report.traffic()
    return Counts(
        read=traffic.read,
        written=traffic.written,
        distinct=traffic.read_unique + traffic.written_unique,
        again=again,
        flops=report.count("mma.sync") * 2 * 16 * 8 * 16,
        instructions=sum(report.instructions.values()) - sum(map(report.count, FREE)),
        wavefronts=report.wavefronts,
        resident=resident,
        fma=report.count("fma.rn.f32"),
    )


def row(name: str, gpu: Gpu, direction: str, counts: list[Counts], floor: float) -> str:
    times = [c.times(gpu) for c in counts]
    total = {name: sum(t[name] for t in times) for name in times[0]}
    predicted = sum(max(t.values()) for t in times)
    cells = [
        name,
        direction,
        f"{total['memory'] * gpu.memory / 1e6:.0f}",
        f"{sum(c.flops for c in counts) / 1e9:.1f}",
        f"{sum(c.instructions for c in counts) / gpu.processors / 1e3:.0f}",
        *(f"{seconds * 1e6:.0f}" for seconds in total.values()),
        max(total, key=lambda name: total[name]),
        f"{predicted * 1e6:.0f}",
        f"{predicted / (floor / gpu.memory):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def head(gpu: Gpu) -> list[str]:
    return [
        f"### {gpu.name}",
        "",
        f"{gpu.processors} processors, {gpu.clock / 1e9:.2f} GHz, memory"
        f" {gpu.memory / 1e12:.2f} TB/s, L2 {gpu.l2 / 1e12:.1f} TB/s of"
        f" {gpu.l2_size / (1 << 20):.0f} MiB, mma.sync {gpu.tensor / 1e12:.0f} TFLOP/s.",
        "",
        "| workload | | MB | GFLOP | k instructions a processor | memory | L2 | tensor |"
        " issue | shared | binds | predicted | of the floor |",
        "|---|---|" + "---:|" * 8 + "---|---:|---:|",
    ]


def eager_launches(
    op: Callable[[dict[str, Tensor]], Sequence[Tensor]], tensors: dict[str, Tensor]
) -> tuple[int, int]:
    """How many kernels backend `eager` launches, forward and backward."""
    from library_calls import library_launches

    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    outs: list[Tensor] = []
    with fastadapters.backend("eager"):
        forward = library_launches(lambda: outs.extend(op(leaves)))
    d_outs = [torch.ones_like(out) for out in outs]
    backward = library_launches(lambda: torch.autograd.grad(outs, [*leaves.values()], d_outs))
    return len(forward), len(backward)


def least_seconds(gpu: Gpu, flops: float, rate: float, passes: Sequence[tuple[int, int]]) -> float:
    """Of products at 80 % of ``rate`` and of passes, so many over so many bytes.

    From the L2 cache what fits it twice.
    """
    seconds = flops / (0.8 * rate)
    for n, size in passes:
        seconds += n * size / (gpu.l2 if 2 * size < gpu.l2_size else gpu.memory)
    return seconds


def worse_ratio(eager: Sequence[float], ours: Sequence[float]) -> float:
    """Eager's time over ours, each forward and backward: of a forward or of a training step."""
    return min(eager[0] / ours[0], sum(eager) / sum(ours))


def rewrite(heading: str, text: str) -> None:
    """Puts ``text`` in the place of a section of the page."""
    page = PAGE.read_text() if PAGE.exists() else "# Performance\n\n"
    before, found, after = page.partition(f"{heading}\n")
    rest = re.search(r"^## ", after, re.MULTILINE) if found else None
    end = after[rest.start() :] if rest else ""
    PAGE.write_text(before.rstrip() + "\n\n" + text + ("\n" + end if end else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description="Predict times on GPUs.")
    parser.add_argument("ops", nargs="*", choices=OPS, default=OPS)
    for op in parser.parse_args().ops:
        of_op = importlib.import_module(f"benches.model_{op}")
        text = of_op.section()
        print(text, flush=True)
        rewrite(of_op.HEADING, text)


if __name__ == "__main__":
    main()

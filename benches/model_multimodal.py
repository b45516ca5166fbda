"""What the CUDA kernels of the multi-modal head should take on GPUs that need not be at hand.

Each launch is counted at five small numbers of texts and items, in whole tiles; its counts are
a + b C + c B + d C B + e C^2, which gives those at full size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .model import FREE, GPUS, Gpu

HEADING = "## GPU: predicted, the multi-modal head"
SAMPLES = ((64, 32), (128, 32), (192, 32), (64, 64), (128, 64))
SIZES = ((1000, 64), (397, 256))  # C, B
DIM, WIDTH, HEADS, HIDDEN = 512, 128, 4, 32
ADDITIVE = (0.0, 1.0, 1.0, 0.0)
INTRODUCTION = """
Not measured: written by `python -m benches.model multimodal`. CUDA backend, fp32, an additive
bias, all gradients, D 512, E 128, R 32, 4 heads. Launches, k warp instructions a processor, and
us that each resource alone would take, summed over the launches of a call: FMA pipe (64 lanes a
clock on the A100, 128 on the others), issue, shared memory and L1 (a wavefront, or a line of
global memory, a clock), L2. `predicted` sums the largest of each launch; launches themselves and
tails come on top.

| GPU | C, B | | launches | k instructions | FMA | issue | shared, L1 | L2 | binds | predicted |
|---|---|---|---:|---:|---:|---:|---:|---:|---|---:|
"""


class Counts(NamedTuple):
    """Of one launch."""

    name: str
    fma: float  # warp instructions of the FMA pipe
    instructions: float
    wavefronts: float
    bytes: float


PIPE = ("fma.rn.f32", "mul.f32", "add.f32", "sub.f32", "mul.rn.f32", "add.rn.f32", "sub.rn.f32")


def count(c: int, b: int) -> tuple[list[Counts], int]:
    """Of every launch of a training step, and how many are forward's."""
    import cuda_backend
    import device

    ops = cuda_backend.load()
    with torch.no_grad(), device.arena():
        text, image = torch.randn(c, DIM), torch.randn(b, DIM)
        shapes = ((WIDTH, DIM), (3 * WIDTH, WIDTH), (WIDTH, WIDTH), (HIDDEN, WIDTH), (DIM, HIDDEN))
        layers = [(torch.randn(o, i) * i**-0.5, torch.zeros(o)) for o, i in shapes]
        flat = [*layers[0], None, None, *itertools.chain(*layers[1:]), None, None]
        options = (0.2, 100.0, HEADS, *ADDITIVE, 0, 0, 0)
        with device.simulate(80) as run:
            _, state = ops.multimodal_logits_forward(text, image, *flat, *options, True)
            forward = len(run.launches)
            d_logits = torch.randn(b, c)
            needs = sum(1 << i for i, t in enumerate((text, image, *flat)) if t is not None)
            ops.multimodal_logits_backward(d_logits, text, state, image, *flat, *options, needs)
    return [measure(r) for r in run.launches], forward


def measure(r: Any) -> Counts:
    traffic = r.traffic()
    return Counts(
        r.name,
        sum(r.count(prefix) for prefix in PIPE),
        sum(r.instructions.values()) - sum(r.count(prefix) for prefix in FREE),
        r.wavefronts + (traffic.read_lines + traffic.written_lines) / 128,
        traffic.read_sectors + traffic.written_sectors,
    )


def at_size(samples: Sequence[Sequence[Counts]], c: int, b: int) -> list[Counts]:
    def terms(c: int, b: int) -> list[float]:
        return [1.0, c, b, c * b, c * c]

    matrix = torch.tensor([terms(*s) for s in SAMPLES], dtype=torch.float64)
    full = torch.tensor(terms(c, b), dtype=torch.float64)
    found = []
    for launches in zip(*samples, strict=True):
        values = torch.tensor([launch[1:] for launch in launches], dtype=torch.float64)
        found.append(
            Counts(launches[0].name, *(full @ torch.linalg.solve(matrix, values)).tolist())
        )
    return found


def times(counts: Counts, gpu: Gpu) -> dict[str, float]:
    cycles = gpu.processors * gpu.clock
    return {
        "FMA": counts.fma * 32 / ((64 if gpu.arch == 80 else 128) * cycles),
        "issue": counts.instructions / (4 * cycles),
        "shared": counts.wavefronts / cycles,
        "L2": counts.bytes / gpu.l2,
    }


def section() -> str:
    counted = [count(*s) for s in SAMPLES]
    forward = counted[0][1]
    lines = []
    for gpu, (c, b) in itertools.product(GPUS, SIZES):
        full = at_size([launches for launches, _ in counted], c, b)
        for direction, part in (("forward", full[:forward]), ("backward", full[forward:])):
            each = [times(launch, gpu) for launch in part]
            total = {name: sum(t[name] for t in each) for name in each[0]}
            cells = [gpu.name, f"{c}, {b}", direction, str(len(part))]
            cells.append(f"{sum(x.instructions for x in part) / gpu.processors / 1e3:.1f}")
            cells += [f"{seconds * 1e6:.1f}" for seconds in total.values()]
            cells.append(max(total, key=lambda name: total[name]))
            cells.append(f"{sum(max(t.values()) for t in each) * 1e6:.0f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([HEADING, "", INTRODUCTION.strip(), *lines]) + "\n"

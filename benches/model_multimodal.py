"""What the CUDA kernels of the multi-modal head should take on GPUs that need not be at hand.

Each launch is counted at five small numbers of texts and items, in whole tiles; its counts are
a + b C + c B + d C B + e C^2, which gives those at full size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .model import FREE, GPUS, Gpu, eager_launches, least_seconds, worse_ratio
from .model_bottleneck import LAUNCH

HEADING = "## GPU: predicted, the multi-modal head"
SAMPLES = ((64, 32), (128, 32), (192, 32), (64, 64), (128, 64))
SIZES = ((1000, 64, 32), (397, 256, 32), (397, 256, 128))  # C, B, R
DIM, WIDTH, HEADS = 512, 128, 4
ADDITIVE = (0.0, 1.0, 1.0, 0.0)
# us forward and backward that were planned before a kernel was written, at R 32.
PLANS = {
    ("A100 SXM 80 GB", 1000, 64): (65, 160),
    ("A100 SXM 80 GB", 397, 256): (60, 160),
    ("H100 SXM", 1000, 64): (30, 75),
    ("H100 SXM", 397, 256): (30, 75),
}
INTRODUCTION = """
Not measured: written by `python -m benches.model multimodal`. CUDA backend, fp32, an additive
bias, all gradients, D 512, E 128, 4 heads. Launches, k warp instructions a processor, and
us that each resource alone would take, summed over the launches of a call: FMA pipe (64 lanes a
clock on the A100, 128 on the others), issue, shared memory and L1 (a wavefront, or a line of
global memory, a clock), L2. `predicted` sums the largest of each launch; launches themselves and
tails come on top. `plan`: predicted over what was planned on paper (H100 30 us forward and 75
backward, A100 65 or 60 and 160). `eager`: the least that its products and its passes over
[C, B, R] and [H, C, C] can take, products at 80 % of the data sheet, what fits the L2 cache from
there, its launches (140 and 316) for nothing. What the Triton kernels lose to bank conflicts in
fp32, 2 to 4 times in products, and why: [triton-resources.md](triton-resources.md#bank-conflicts).

| GPU | C, B, R | | launches | k instr | FMA | issue | L1 | L2 | binds | predicted | plan | eager |
|---|---|---|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|
"""


class Counts(NamedTuple):
    """Of one launch."""

    name: str
    fma: float  # warp instructions of the FMA pipe
    instructions: float
    wavefronts: float
    bytes: float


PIPE = ("fma.rn.f32", "mul.f32", "add.f32", "sub.f32", "mul.rn.f32", "add.rn.f32", "sub.rn.f32")


def count(c: int, b: int, r: int) -> tuple[list[Counts], int]:
    """Of every launch of a training step, and how many are forward's."""
    import cuda_backend
    import device

    ops = cuda_backend.load()
    with torch.no_grad(), device.arena():
        text, image = torch.randn(c, DIM), torch.randn(b, DIM)
        shapes = ((WIDTH, DIM), (3 * WIDTH, WIDTH), (WIDTH, WIDTH), (r, WIDTH), (DIM, r))
        layers = [(torch.randn(o, i) * i**-0.5, torch.zeros(o)) for o, i in shapes]
        flat = [*layers[0], None, None, *itertools.chain(*layers[1:]), None, None]
        options = (0.2, 100.0, HEADS, *ADDITIVE, 0, 0, 0)
        with device.simulate(80) as run:
            _, state = ops.multimodal_logits_forward(text, image, *flat, *options, True)
            forward = len(run.launches)
            d_logits = torch.randn(b, c)
            needs = sum(1 << i for i, t in enumerate((text, image, *flat)) if t is not None)
            ops.multimodal_logits_backward(d_logits, text, state, image, *flat, *options, needs)
    return [measure(report) for report in run.launches], forward


@functools.cache
def counts(r: int) -> list[tuple[list[Counts], int]]:
    return [count(*sample, r) for sample in SAMPLES]


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


def predicted(launches: Sequence[Counts], gpu: Gpu) -> float:
    """Seconds: of each launch what takes longest."""
    return sum(max(times(launch, gpu).values()) for launch in launches)


def eager_times(gpu: Gpu, c: int, b: int, r: int) -> tuple[float, float]:
    """Least seconds of `eager`, forward and backward, in its favour: see INTRODUCTION."""
    pairs, scores, rows = 4 * c * b * r, 4 * HEADS * c * (c + b), c + b
    layers = rows * WIDTH * (DIM + 4 * WIDTH) + c * DIM * (b + r)  # products, in FMA
    attention = 2 * c * rows * WIDTH
    mixtures, forms = 2 * HEADS * c * b * r, c * b * r * r

    forward = layers + attention + mixtures + 2 * forms
    backward = 2 * (layers + mixtures + forms) + 5 * attention // 2
    # Of its elementwise operations and sums each reads what it is given and writes what it makes.
    return (
        least_seconds(gpu, 2 * forward, gpu.vendor_fp32, ((24, pairs), (8, scores))),
        least_seconds(gpu, 2 * backward, gpu.vendor_fp32, ((32, pairs), (10, scores))),
    )


def kernels(c: int, b: int, r: int) -> tuple[list[Counts], list[Counts]]:
    """Forward's and backward's, at full size."""
    counted = counts(r)
    forward = counted[0][1]
    full = at_size([launches for launches, _ in counted], c, b)
    return full[:forward], full[forward:]


def points(gpu: Gpu, kind: str) -> dict[tuple[int, int], float]:
    """(D, R) to the worst ratio of eager's time to ours, launches counted.

    All is fp32 inside, whatever the features are.
    """
    from multimodal_cases import head_tensors, logits

    found: dict[tuple[int, int], float] = {}
    bias = (ADDITIVE[:2], ADDITIVE[2:])
    tensors = head_tensors(5, 3, 16, 8, 4, torch.float32)
    launches = eager_launches(lambda t: [logits(t, bias=bias)], tensors)
    for r, (c, b) in itertools.product((32, 64, 128), ((100, 32), (397, 256), (1000, 64))):
        ours = [predicted(part, gpu) + len(part) * LAUNCH for part in kernels(c, b, r)]
        eager = eager_times(gpu, c, b, r)
        plain = [t + n * LAUNCH for t, n in zip(eager, launches, strict=True)]
        ratio = worse_ratio(plain, ours)
        print(f"{gpu.name} {kind} C {c} B {b} R {r}: {ratio:.2f}", flush=True)
        found[DIM, r] = min(ratio, found.get((DIM, r), ratio))
    return found


def section() -> str:
    lines = []
    for (c, b, r), gpu in itertools.product(SIZES, GPUS):
        planned = PLANS.get((gpu.name, c, b)) if r == 32 else None
        for i, (part, eager) in enumerate(
            zip(kernels(c, b, r), eager_times(gpu, c, b, r), strict=True)
        ):
            each = [times(launch, gpu) for launch in part]
            total = {name: sum(t[name] for t in each) for name in each[0]}
            us = predicted(part, gpu) * 1e6
            cells = [gpu.name, f"{c}, {b}, {r}", ("forward", "backward")[i], str(len(part))]
            cells.append(f"{sum(x.instructions for x in part) / gpu.processors / 1e3:.1f}")
            cells += [f"{seconds * 1e6:.1f}" for seconds in total.values()]
            cells.append(max(total, key=lambda name: total[name]))
            cells += [
                f"{us:.0f}",
                f"{us / planned[i]:.2f}" if planned else "",
                f"{eager * 1e6:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([HEADING, "", INTRODUCTION.strip(), *lines]) + "\n"

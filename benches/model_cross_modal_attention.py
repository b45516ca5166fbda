"""What the CUDA kernels of cross-modal attention should take on GPUs that need not be at hand.

Counts are exact: the kernels run on the PTX machine at full size, cut for as many processors as the
GPU has. Rates and what is made of them: see model.py.
"""

from __future__ import annotations

import functools
import itertools

import torch

from fastadapters.functional import cross_modal_attention

from .model import (
    GPUS,
    Counts,
    Gpu,
    counted,
    eager_launches,
    head,
    least_seconds,
    row,
    worse_ratio,
)
from .model_bottleneck import LAUNCH
from .workloads import CROSS_MODAL_ATTENTION, CrossModalAttention

HEADING = "## GPU: predicted, cross-modal attention"
DTYPES = (torch.bfloat16, torch.float32)
WORKLOADS = [w for w in CROSS_MODAL_ATTENTION if w.classes >= 397]  # else all is launches
INTRODUCTION = """
Not measured: written by `python -m benches.model cross_modal_attention`; columns as of the
bottleneck. CUDA backend, an additive bias, one image an item, both outputs, all gradients, 4 heads
of d 32. The floor: inputs, outputs and gradients once, of which the text output [B, C, H, d] is
nearly all. What kernels hand to each other counts as memory, though it stays in the L2 cache. With
1000 texts the walks over them are 68 blocks forward and 136 backward of 4 warps, about one a
processor, so that latency, which no column shows, adds to them.
"""


@functools.cache
def run(w: CrossModalAttention, gpu: Gpu, dtype: torch.dtype) -> tuple[list[Counts], list[Counts]]:
    """The kernels of forward and of backward."""
    import cuda_backend
    import device
    from attention_cases import ADDITIVE, NAMES, attention_tensors, numbers

    ops = cuda_backend.load()
    few, device.MULTIPROCESSORS = device.MULTIPROCESSORS, gpu.processors
    options = (w.width**-0.5, *numbers(ADDITIVE), 3)
    with torch.no_grad(), device.arena():
        tensors = attention_tensors((w.classes, 1, w.batch, w.heads, w.width), dtype)
        values = [tensors[name] for name in NAMES]
        with device.simulate(gpu.arch) as simulation:
            *outs, state = ops.cross_modal_attention_forward(*values, *options, True)
            forward = len(simulation.launches)
            ops.cross_modal_attention_backward(*outs, *values, state, *options, 63)
    device.MULTIPROCESSORS = few
    counts = [counted(report) for report in simulation.launches]
    return counts[:forward], counts[forward:]


def eager_times(w: CrossModalAttention, gpu: Gpu, dtype: torch.dtype) -> tuple[float, float]:
    """Least seconds of `eager`, forward and backward, in its favour.

    Without launches. Products at 80 % of the data sheet. Passes are of elementwise operations and
    sums, which read what they are given and write what they make, over scores in fp32 and
    [B, C, H, d]; from the L2 cache what fits it twice.
    """
    c, b, size = w.classes, w.batch, dtype.itemsize
    width = w.heads * w.width
    scores, out = 4 * w.heads * c * (c + b), size * b * c * width
    products = 2 * c * (c + b) * width + b * c * width  # texts and images over texts; lse of pairs
    rate = gpu.vendor_fp32 if dtype == torch.float32 else gpu.vendor
    # lerp's backward makes three tensors as large as its output, and each is summed.
    return (
        least_seconds(gpu, 2 * products, rate, ((8, scores), (1, out))),
        least_seconds(gpu, 4 * products, rate, ((10, scores), (9, out))),
    )


def points(gpu: Gpu, kind: str) -> dict[tuple[int, int], float]:
    """(H d, d) to the worst ratio of eager's time to ours, launches counted."""
    from attention_cases import ADDITIVE, attention_tensors

    found: dict[tuple[int, int], float] = {}
    dtype = getattr(torch, kind)
    tensors = attention_tensors((5, 1, 3, 2, 8), dtype)
    launches = eager_launches(lambda t: cross_modal_attention(**t, bias=ADDITIVE), tensors)
    for width, (c, b) in itertools.product((32, 128), ((397, 64), (1000, 64))):
        w = CrossModalAttention("", c, b, width=width)
        ours = [
            sum(max(k.times(gpu).values()) + LAUNCH for k in part) for part in run(w, gpu, dtype)
        ]
        eager = eager_times(w, gpu, dtype)
        plain = [t + n * LAUNCH for t, n in zip(eager, launches, strict=True)]
        ratio = worse_ratio(plain, ours)
        print(f"{gpu.name} {kind} d {width} C {c} B {b}: {ratio:.2f}", flush=True)
        at = w.heads * width, width
        found[at] = min(ratio, found.get(at, ratio))
    return found


def section() -> str:
    lines = [HEADING, "", INTRODUCTION.strip(), ""]
    for gpu in GPUS:
        lines += head(gpu)
        for dtype, w in itertools.product(DTYPES, WORKLOADS):
            name = f"{str(dtype).removeprefix('torch.')}, C {w.classes}, B {w.batch}"
            for direction, counts, cost in zip(
                ("forward", "backward"), run(w, gpu, dtype), w.costs(training=True), strict=True
            ):
                lines.append(row(name, gpu, direction, counts, dtype.itemsize * cost.elements))
        lines.append("")
    return "\n".join(lines)

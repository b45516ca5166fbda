"""What the CUDA kernels of cross-modal attention should take on GPUs that need not be at hand.

Counts are exact: the kernels run on the PTX machine at full size, cut for as many processors as the
GPU has. Rates and what is made of them: see model.py.
"""

from __future__ import annotations

import functools
import itertools

import torch

from .model import GPUS, Counts, Gpu, counted, head, row
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

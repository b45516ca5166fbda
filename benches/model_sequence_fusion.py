"""What the CUDA kernels of sequence fusion should take on GPUs that need not be at hand.

Counts are exact: the kernels run on the PTX machine at full size, cut for as many processors as the
GPU has. Rates and what is made of them: see model.py.
"""

from __future__ import annotations

import torch

from fastadapters.ops.codes import ACTIVATION_CODES, DTYPE_CODES

from .model import GPUS, Counts, Gpu, counted, head, row
from .workloads import SEQUENCE_FUSION, SequenceFusion

HEADING = "## GPU: predicted, sequence fusion"
INTRODUCTION = """
Not measured: written by `python -m benches.model sequence_fusion`; columns as in the section above.
bf16 activations, fp32 parameters, CUDA backend, residual of the leading tokens (with raw widths
none), all gradients. What kernels hand to each other (P, z, dP, dz, partial sums) counts as memory,
though most of it stays in the L2 cache. Backward's floor has x and dx, dy, and the parameters and
their gradients. Memory binds the large workloads. The small ones take a few thousand instructions a
processor: there the launches (1 and 3; of the large 2 and 4) are what takes the time.
"""


def run(w: SequenceFusion, gpu: Gpu) -> tuple[list[Counts], list[Counts]]:
    """The kernels of forward and of backward."""
    import cuda_backend
    import device

    ops = cuda_backend.load()
    r, bf16 = w.bottleneck, DTYPE_CODES[torch.bfloat16]
    modalities = range(len(w.lengths))
    few, device.MULTIPROCESSORS = device.MULTIPROCESSORS, gpu.processors
    with device.arena():
        sizes = zip(w.lengths, w.dims, strict=True)
        xs = [torch.zeros(w.batch, t, width, dtype=torch.bfloat16) for t, width in sizes]
        parameters = (
            [torch.zeros(r, width) for width in w.dims],
            [torch.zeros(r) for _ in modalities],
            [torch.zeros(w.rank, t, w.out_len) for t in w.lengths],
            [torch.zeros(w.rank, r, w.dim) for _ in modalities],
            None,
        )
        options = (ACTIVATION_CODES["gelu"], bf16, bf16, False, not w.widths)
        with device.simulate(gpu.arch) as simulation:
            y, products, z = ops.sequence_fusion_forward(xs, None, *parameters, *options, True)
            forward = len(simulation.launches)
            needs = (1 << 5 * len(w.lengths)) - 1
            ops.sequence_fusion_backward(y, xs, products, z, *parameters, *options, needs)
    device.MULTIPROCESSORS = few
    counts = [counted(report) for report in simulation.launches]
    return counts[:forward], counts[forward:]


def section() -> str:
    lines = [HEADING, "", INTRODUCTION.strip(), ""]
    for gpu in GPUS:
        lines += head(gpu)
        for w in SEQUENCE_FUSION:
            name = f"{w.name}, B {w.batch}, D {w.dim}, r {w.bottleneck}"
            for direction, counts, cost in zip(
                ("forward", "backward"), run(w, gpu), w.costs(training=True), strict=True
            ):
                lines.append(row(name, gpu, direction, counts, 2.0 * cost.elements))
        lines.append("")
    return "\n".join(lines)

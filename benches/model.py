"""What the CUDA kernels should take on GPUs that this machine need not have.

    python -m benches.model                  # prints the predictions of docs/performance.md anew
    python -m benches.model multimodal       # ... of the head alone, or of another op

Here is the bottleneck; model_<op>.py has each of the others.

Counts are exact: the kernels run on the PTX machine (tests/gpu) with two numbers of rows, which
gives each count per tile and per call. Rates are the data sheets' where those can be reached.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastadapters.crossover import LIMITS
from fastadapters.ops.codes import ACTIVATION_CODES, DTYPE_CODES

from .workloads import BOTTLENECK, Bottleneck

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "gpu"), str(ROOT / "tests")]
PAGE = ROOT / "docs" / "performance.md"
HEADING = "## GPU: predicted"
TILE = 64
# In the names of backward's kernels.
ACCUMULATING, BY_COLUMNS = "ELb1ELb1E", "column_pass"
# PTX that no instruction of the machine code stands for.
FREE = ("ld.param", "mov", "cvta", "bra.uni")


INTRODUCTION = """
Not measured: written by `python -m benches.model`. On a GPU, `pytest benches/ --device cuda`
measures the same workloads and prints the share of the roof that they reach.

bf16 activations, fp32 parameters, CUDA backend. MB: to and from memory. Instructions: of
warps, as PTX without parameter loads and moves, which become no machine code. Times in us:
what each resource alone would take, summed over the kernels of a call; `predicted` sums the
largest of each kernel, the last column divides it by the least time for reading the inputs and
writing the outputs once. Launches, the last wave of blocks and imperfect overlap come on top.

Memory, clock and tensor rates are from data sheets, mma.sync on Hopper taken as 62 % of
wgmma's. The L2 cache's are for reads, as measured by others (on the H100 with 114 processors,
scaled to 132); writes go the other way through the crossbar and are counted beside them.

Backward needs z where forward had it: without LayerNorm forward saves it, [M, r], and the data
pass reads dy and z alone; behind LayerNorm it reads x and makes z once more. The weight pass reads
x and dy again: 4/3 of the floor at least, with LayerNorm 5/3. Where r is at most 32 and shared
memory has room for dWu in fp32, [D, r], the data pass accumulates it, and dy is read once; each
block's sum goes through memory, which counts as written and read. Partial sums that the launch
before has written (splits of the weight pass) are read from the L2 cache.

What is read again: a block keeps the chunks of x (backward: dy) that fit into its shared
memory, two blocks on a processor, and asks the L2 cache for the others a second time: at D =
768 and 1024 that is 25 and 44 % of them on sm_90, 58 and 69 % on sm_80. They are there as long
as the tiles of all blocks under way are: 64 rows x D x 2 bytes x 2 blocks x processors is 21
and 28 MB of the A100's 40 MB, 26 and 35 MB of the H100's 50 MB, 25 and 34 MB of the 4090's 72
MB. Outputs are stored with an evict-first hint, so they leave the cache before. At D = 4096
the tiles (113 MB on the A100, 138 MB on the H100, 134 MB on the 4090) do not fit: there what
shared memory has not kept is counted as read from memory twice. Backward's data pass then makes
dz alone, and dx, dWd and dWu are made column by column: dx and dWu share dy, 4/3 of the floor.

Rectangular LoRA reads dy twice where dWu, [D_out, r], does not fit shared memory. Input dropout
makes its bits anew for y, dx and dWd: some 80 instructions for four elements.
"""


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
    Gpu("A100 SXM 80 GB", 80, 108, 1.41e9, 2.04e12, 4.5e12, 40e6, 312e12, 312e12, 19.5e12),
    Gpu("H100 SXM", 90, 132, 1.755e9, 3.35e12, 6.4e12, 50e6, 0.62 * 989e12, 989e12, 67e12),
    Gpu("RTX 4090", 89, 128, 2.52e9, 1.008e12, 5.0e12, 72e6, 165e12, 165e12, 82.6e12),
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


@functools.cache
def run(w: Bottleneck, arch: int, rows: int, kind: str) -> tuple[list[Counts], int, str]:
    """A training step with fp32 parameters: its kernels, and how many of them are forward's.

    And what backward does, ACCUMULATING, BY_COLUMNS or neither. ``kind``: bfloat16, float32, or
    autocast, which is x and y in fp32 and products in bf16.
    """
    import cuda_backend
    import device
    from compile_checks import PROCESSORS

    ops = cuda_backend.load()
    products = torch.float32 if kind == "float32" else torch.bfloat16
    stored = torch.bfloat16 if kind == "bfloat16" else torch.float32
    with device.arena():
        out = w.out_dim or w.dim
        x, dy = (torch.zeros(rows, width, dtype=stored) for width in (w.dim, out))
        residual = torch.zeros_like(dy) if w.residual == "other" else None
        down, up = torch.zeros(w.bottleneck, w.dim), torch.zeros(out, w.bottleneck)
        biases = [torch.zeros(n) if w.bias else None for n in (w.bottleneck, out)]
        norm = [torch.ones(w.dim), torch.zeros(w.dim)] if w.norm else [None, None]
        seed = torch.tensor([1, 2]) if w.dropout or w.input_dropout else None
        parameters = (down, biases[0], up, biases[1], *norm, None, seed)
        codes = ACTIVATION_CODES[w.activation], DTYPE_CODES[products], DTYPE_CODES[stored]
        options = (w.scale, 1e-5, w.dropout, w.input_dropout, *codes, residual is None)
        with device.simulate(arch) as simulation:
            _, z, stats = ops.bottleneck_forward(x, residual, *parameters, *options, True)
            forward = len(simulation.launches)
            ops.bottleneck_backward(dy, x, z, stats, *parameters, *options, 0b1111111)

    def measure(report: Any) -> Counts:
        rows_traffic = [report.traffic(t) for t in (x, dy)]
        blocks = PROCESSORS[arch].shared // (report.shared_bytes + 1024)
        return counted(
            report,
            again=sum(t.read - t.read_unique for t in rows_traffic),
            resident=blocks * TILE * w.dim * stored.itemsize if "data_pass" in report.name else 0,
        )

    names = [report.name for report in simulation.launches]
    way = next((w for w in (ACCUMULATING, BY_COLUMNS) if any(w in name for name in names)), "")
    return [measure(report) for report in simulation.launches], forward, way


def kernels(w: Bottleneck, gpu: Gpu, kind: str = "bfloat16") -> tuple[list[Counts], list[Counts]]:
    """Forward's and backward's, at full size: counts are linear in the number of tiles."""
    shape = w._replace(name="", batch=1, tokens=1, cpu_batch=1, quick=False)
    width, out = -(-w.bottleneck // 16) * 16, w.out_dim or w.dim
    counted_tiles = 2, 4
    if w.bottleneck <= 32 and out * width * 4 < 160 * 1024:  # rows enough to accumulate dWu
        counted_tiles = 4 + width // 4, 8 + width // 4
    (few, forward, way), (many, *_) = (run(shape, gpu.arch, n * TILE, kind) for n in counted_tiles)
    tiles = -(-w.batch * w.tokens // TILE)
    share = (tiles - counted_tiles[0]) / (counted_tiles[1] - counted_tiles[0])
    full = []
    for a, b in zip(few, many, strict=True):
        pairs = zip(vars(a).values(), vars(b).values(), strict=True)
        full.append(Counts(*(u + (v - u) * share for u, v in pairs)))
    # The machine has four processors: here there are more partial sums.
    data_pass, weight_pass, finish = full[-3:]
    chunks = [-(-d * 2 // 128) for d in (w.dim, out)]
    columns = (chunks[0] if way else sum(chunks)) * -(-w.bottleneck // (32 if width <= 32 else 64))
    splits = max(2 * gpu.processors // columns, 1)
    partial = (splits - 1) * (w.dim + (out if way != ACCUMULATING else 0)) * width * 4
    weight_pass.written += partial
    weight_pass.distinct += partial
    finish.read += partial
    if way == ACCUMULATING:
        blocks = -(-tiles // -(-tiles // gpu.processors))
        partial = (blocks - 4) * out * (width + 1) * 4
        data_pass.written += partial
        data_pass.distinct += partial
        finish.read += partial
        finish.distinct += partial
    return full[:forward], full[forward:]


def eager_times(w: Bottleneck, gpu: Gpu, kind: str) -> tuple[float, float]:
    """Least seconds of `eager`, forward and backward, with x as residual: in its favour.

    Each of its kernels takes what memory or the vendor's products take, these at 80 % of the data
    sheet. Tensors [M, r] cost nothing where two of them fit the L2 cache.
    """
    m, d, r = w.batch * w.tokens, w.dim, w.bottleneck
    size = 2 if kind == "bfloat16" else 4
    half = 4 if kind == "float32" else 2  # what the products read and write
    large, narrow = m * d, m * r * half
    if 2 * narrow < gpu.l2_size:
        narrow = 0
    product = 2 * m * d * r / (0.8 * (gpu.vendor_fp32 if kind == "float32" else gpu.vendor))

    def took(bytes_moved: float, products: int = 0) -> float:
        return max(bytes_moved / gpu.memory, products * product)

    cast = took(large * (size + half)) if size != half else 0.0
    add = took(large * (half + 2 * size))
    forward = [cast, took(large * half + narrow, 1), took(2 * narrow)]
    forward += [took(large * half + narrow, 1), add]
    backward = [cast, *[took(large * half + narrow, 1)] * 4]  # dh, dWu, dx, dWd
    backward += [took(large * half), took(3 * narrow), took(narrow), add]  # bias, relu, bias, dx
    return sum(forward), sum(backward)


def points(gpu: Gpu, kind: str) -> dict[tuple[int, int], float]:
    """(D, r) to the worst ratio of eager's time to ours, for 32768 rows."""
    found: dict[tuple[int, int], float] = {}
    for d, widths in ((768, (32, 64, 128, 192, 256)), (4096, (64, 128))):
        for r in widths:
            w = Bottleneck("", 64, 512, d, r, cpu_batch=64)
            ours = [sum(max(c.times(gpu).values()) for c in cs) for cs in kernels(w, gpu, kind)]
            forward, backward = eager_times(w, gpu, kind)
            found[d, r] = min(forward / ours[0], (forward + backward) / sum(ours))
            print(f"{gpu.name} {kind} D {d} r {r}: {found[d, r]:.2f}", flush=True)
    return found


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
        f" {gpu.l2_size / 1e6:.0f} MB, mma.sync {gpu.tensor / 1e12:.0f} TFLOP/s.",
        "",
        "| workload | | MB | GFLOP | k instructions a processor | memory | L2 | tensor |"
        " issue | shared | binds | predicted | of the floor |",
        "|---|---|" + "---:|" * 8 + "---|---:|---:|",
    ]


def section() -> str:
    lines = [HEADING, "", INTRODUCTION.strip(), ""]
    for gpu in GPUS:
        lines += head(gpu)
        for w in BOTTLENECK:
            if LIMITS["bottleneck", "cuda", "other", torch.bfloat16].exceeded(w.dim, w.bottleneck):
                continue
            costs = w.costs(training=True)
            name = f"{w.name}{'' if w.out_dim else f', D {w.dim}'}, r {w.bottleneck}"
            for direction, counts, cost in zip(
                ("forward", "backward"), kernels(w, gpu), costs, strict=True
            ):
                lines.append(row(name, gpu, direction, counts, 2.0 * cost.elements))
        lines.append("")
    return "\n".join(lines)


def rewrite(heading: str, text: str) -> None:
    """Puts ``text`` in the place of a section of the page."""
    page = PAGE.read_text() if PAGE.exists() else "# Performance\n\n"
    before, found, after = page.partition(f"{heading}\n")
    rest = re.search(r"^## ", after, re.MULTILINE) if found else None
    end = after[rest.start() :] if rest else ""
    PAGE.write_text(before.rstrip() + "\n\n" + text + ("\n" + end if end else ""))


def main() -> None:
    from . import model_cross_modal_attention, model_multimodal, model_sequence_fusion

    sections = {
        "bottleneck": (HEADING, section),
        "sequence_fusion": (model_sequence_fusion.HEADING, model_sequence_fusion.section),
        "multimodal": (model_multimodal.HEADING, model_multimodal.section),
        "cross_modal_attention": (
            model_cross_modal_attention.HEADING,
            model_cross_modal_attention.section,
        ),
    }
    parser = argparse.ArgumentParser(description="Predict times on GPUs.")
    parser.add_argument("ops", nargs="*", choices=[*sections], default=[*sections])
    for op in parser.parse_args().ops:
        heading, write = sections[op]
        text = write()
        print(text, flush=True)
        rewrite(heading, text)


if __name__ == "__main__":
    main()

"""What the CUDA kernels of the bottleneck should take on GPUs that need not be at hand.

Counts are exact: the kernels run on the PTX machine (tests/gpu) with two numbers of rows, which
gives each count per tile and per call. Rates and what is made of them: see model.py.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from fastadapters.crossover import LIMITS
from fastadapters.ops.codes import ACTIVATION_CODES, DTYPE_CODES

from .model import GPUS, Counts, Gpu, counted, head, row, worse_ratio
from .workloads import BOTTLENECK, GROUPED, Bottleneck, Grouped

HEADING = "## GPU: predicted"
TILE = 64
LAUNCH = 3e-6
# In the names of backward's kernels.
ACCUMULATING, BY_COLUMNS = "ELb1ELb1E", "column_pass"

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
x and dy again, with dz and h, which the data pass has written: 4/3 of the floor at least, with
LayerNorm 5/3. The h of identity and relu tells their derivative, so forward saves it in the place
of z, and the weight pass takes it from there. Where r is at most 32 and shared
memory has room for dWu in fp32, [D, r] (99 KiB: up to D 768 at r 16, D 1024 at r 8), the data pass
accumulates it, and dy is read once; each block's sum goes through memory, which counts as written
and read. Partial sums that the launch
before has written (splits of the weight pass) are read from the L2 cache.

Where x and dy of the rows of a wave of blocks (two a processor) fit the L2 cache beside a quarter
of dx, and reading from memory takes longer than launches, backward takes the rows in shares, both
passes of each: the weight pass finds dy, with LayerNorm x, too, in the cache, as it does where all
rows fit. Of the three GPUs that is the 4090 with D up to 1024; its further launches, some 3 us
each, come on top as all do.

What is read again: a block keeps the chunks of x (backward: dy) that fit into its shared
memory, two blocks on a processor, and asks the L2 cache for the others a second time: at D =
768 and 1024 that is 25 and 44 % of them on sm_90, 58 and 69 % on sm_80. They are there as long
as the tiles of all blocks under way are: 64 rows x D x 2 bytes x 2 blocks x processors is 21
and 28 MB of the A100's 40 MB, 26 and 35 MB of the H100's 50 MB, 25 and 34 MB of the 4090's 72
MB. Outputs are stored with an evict-first hint, so they leave the cache before. At D = 4096
the tiles (113 MB on the A100, 138 MB on the H100, 134 MB on the 4090) do not fit: there what
shared memory has not kept is counted as read from memory twice. Backward's data pass then makes
dz alone, and dx, dWd and dWu are made column by column: dx and dWu share dy, 4/3 of the floor.

Several adapters: one for each item, their parameters and gradients beside x, y, dy and dx; below
them one adapter on as many rows.

Rectangular LoRA reads dy twice where dWu, [D_out, r], does not fit shared memory. Input dropout
makes its bits anew for y, dx and dWd: some 80 instructions for four elements.
"""


@functools.cache
def run(w: Bottleneck, arch: int, rows: int, kind: str) -> tuple[list[Counts], int, str]:
    """A training step with fp32 parameters: its kernels, and how many of them are forward's.

    And what backward does, ACCUMULATING, BY_COLUMNS or neither. ``kind``: bfloat16, float32, or
    autocast, which is x and y in fp32 and products in bf16.
    """
    import cuda_backend
    import device

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

    names = [report.name for report in simulation.launches]
    way = next((w for w in (ACCUMULATING, BY_COLUMNS) if any(w in name for name in names)), "")
    return [measure(report, arch, x, dy) for report in simulation.launches], forward, way


def measure(report: Any, arch: int, x: torch.Tensor, dy: torch.Tensor) -> Counts:
    from compile_checks import PROCESSORS

    rows_traffic = [report.traffic(t) for t in (x, dy)]
    blocks = PROCESSORS[arch].shared // (report.shared_bytes + 1024)
    row = x.shape[-1] * x.itemsize if "data_pass" in report.name else 0
    again = sum(t.read - t.read_unique for t in rows_traffic)
    return counted(report, again=again, resident=blocks * TILE * row)


@functools.cache
def run_grouped(w: Grouped, arch: int, adapters: int) -> tuple[list[Counts], int]:
    """As `run`, in bf16, with so many of the adapters, each on its share of the items."""
    import cuda_backend
    import device

    ops, bf16 = cuda_backend.load(), torch.bfloat16
    with device.arena():
        items = w.batch // w.adapters * adapters
        x, dy = (torch.zeros(items, w.tokens, w.dim, dtype=bf16) for _ in range(2))
        down, up = (
            torch.zeros(adapters, *s) for s in ((w.bottleneck, w.dim), (w.dim, w.bottleneck))
        )
        biases = [torch.zeros(adapters, n) for n in (w.bottleneck, w.dim)]
        index = torch.arange(items) % adapters
        parameters = (down, biases[0], up, biases[1], None, None, None, None, index)
        codes = ACTIVATION_CODES["relu"], DTYPE_CODES[bf16], DTYPE_CODES[bf16]
        options = (1.0, 1e-5, 0.0, 0.0, *codes, True)
        with device.simulate(arch) as simulation:
            _, z, stats = ops.grouped_forward(x, None, *parameters, *options, True)
            forward = len(simulation.launches)
            ops.grouped_backward(dy, x, z, stats, *parameters, *options, 0b11111)
    return [measure(report, arch, x, dy) for report in simulation.launches], forward


def spared(w: Bottleneck, kind: str) -> int:
    """Bytes that the weight pass finds in the L2 cache if the rows, or shares of them, fit it."""
    size = 2 if kind == "bfloat16" else 4
    return w.batch * w.tokens * size * ((w.out_dim or w.dim) + (w.dim if w.norm else 0))


def shares(w: Bottleneck, gpu: Gpu, kind: str) -> int:
    """In how many that fit the L2 cache backward takes the rows, see shares.cuh; 0: in none."""
    size = 2 if kind == "bfloat16" else 4
    row = size * ((w.out_dim or w.dim) + w.dim + w.dim // 4)
    wave = 2 * gpu.processors * TILE
    rows = gpu.l2_size // (row * wave) * wave
    if rows == 0:
        return 0
    count = -(-w.batch * w.tokens // rows)
    launches = 2 * (count - 1) * LAUNCH
    return count if spared(w, kind) / gpu.memory > 2 * launches else 0


def shape(w: Bottleneck) -> Bottleneck:
    """What decides the counts of a tile."""
    return w._replace(name="", batch=1, tokens=1, cpu_batch=1, quick=False, scale=1.0)


def counted_tiles(w: Bottleneck) -> tuple[int, int]:
    """Numbers of tiles that are run: enough to accumulate dWu where there may be room for it."""
    width = -(-w.bottleneck // 16) * 16
    room = w.bottleneck <= 32 and (w.out_dim or w.dim) * width * 4 < 160 * 1024
    return (4 + width // 4, 8 + width // 4) if room else (2, 4)


def partial_sums(w: Bottleneck, gpu: Gpu, way: str, size: int = 2) -> tuple[int, int, int, int]:
    """Splits of the weight pass and bytes of one's sums; blocks that accumulate dWu, of one's."""
    width, out = -(-w.bottleneck // 16) * 16, w.out_dim or w.dim
    chunks = [-(-d * size // 128) for d in (w.dim, out)]  # size: of an element of the products
    columns = (chunks[0] if way else sum(chunks)) * -(-w.bottleneck // (32 if width <= 32 else 64))
    of_split = (w.dim + (out if way != ACCUMULATING else 0)) * width * 4
    tiles = -(-w.batch * w.tokens // TILE)
    blocks = -(-tiles // -(-tiles // gpu.processors)) if way == ACCUMULATING else 0
    of_block = out * (-(-w.bottleneck // 8) * 8 + 1) * 4
    return max(2 * gpu.processors // columns, 1), of_split, blocks, of_block


def memory(gpu: Gpu) -> list[str]:
    """What a training step holds beside x, y, dy and dx."""
    lines = [
        f"### Memory of a step, {gpu.name}",
        "",
        "MB beside x, y, dy and dx: z, or h in its place, which is kept from forward to backward,",
        "and what backward takes while it runs: h and dz (dz alone where h was kept, or dWu is",
        "accumulated) and partial sums. The peak is their sum; without z it would be that of h, dz",
        "and the sums, and x be read once more.",
        "",
        "| workload | z | h, dz | partial sums | peak without z | with |",
        "|---|" + "---:|" * 5,
    ]
    for w in predicted():
        if w.norm:
            continue
        way = run(shape(w), gpu.arch, counted_tiles(w)[0] * TILE, "bfloat16")[2]
        splits, of_split, blocks, of_block = partial_sums(w, gpu, way)
        z = 2 * w.batch * w.tokens * w.bottleneck
        dz = 2 * w.batch * w.tokens * -(-w.bottleneck // 16) * 16
        h = 0 if way == ACCUMULATING else dz
        kept = w.activation in ("identity", "relu") and w.bottleneck % 8 == 0
        narrow = dz + (0 if kept else h)
        sums = splits * of_split + blocks * of_block
        cells = (z, narrow, sums, h + dz + sums, z + narrow + sums)
        lines.append(f"| {title(w)} | {' | '.join(f'{n / 1e6:.1f}' for n in cells)} |")
    return [*lines, ""]


def extrapolated(
    few: list[Counts], many: list[Counts], sizes: tuple[int, int], full: int
) -> list[Counts]:
    share = (full - sizes[0]) / (sizes[1] - sizes[0])
    pairs = [
        zip(vars(a).values(), vars(b).values(), strict=True) for a, b in zip(few, many, strict=True)
    ]
    return [Counts(*(u + (v - u) * share for u, v in pair)) for pair in pairs]


def grouped_kernels(w: Grouped, gpu: Gpu) -> tuple[list[Counts], list[Counts]]:
    """Forward's and backward's: linear in the adapters, the rows of each being one split."""
    (few, forward), (many, _) = (run_grouped(w, gpu.arch, n) for n in (1, 2))
    full = extrapolated(few, many, (1, 2), w.adapters)
    return full[:forward], full[forward:]


def kernels(w: Bottleneck, gpu: Gpu, kind: str = "bfloat16") -> tuple[list[Counts], list[Counts]]:
    """Forward's and backward's, at full size: counts are linear in the number of tiles."""
    (few, forward, way), (many, *_) = (
        run(shape(w), gpu.arch, n * TILE, kind) for n in counted_tiles(w)
    )
    full = extrapolated(few, many, counted_tiles(w), -(-w.batch * w.tokens // TILE))
    # The machine has four processors and few tiles: here are more partial sums, and shares.
    data_pass, weight_pass, finish = full[-3:]
    splits, of_split, blocks, of_block = partial_sums(w, gpu, way, 4 if kind == "float32" else 2)
    partial = (splits - 1) * of_split
    weight_pass.written += partial
    weight_pass.distinct += partial
    finish.read += partial
    if not way and (count := shares(w, gpu, kind)):
        weight_pass.distinct -= spared(w, kind)
        weight_pass.read += (count - 1) * splits * of_split
        weight_pass.written += (count - 1) * splits * of_split
    if way == ACCUMULATING:
        partial = (blocks - 4) * of_block
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
            found[d, r] = worse_ratio(eager_times(w, gpu, kind), ours)
            print(f"{gpu.name} {kind} D {d} r {r}: {found[d, r]:.2f}", flush=True)
    return found


def predicted() -> list[Bottleneck]:
    """The workloads that `auto` runs on the kernels; r 16 at D 1024; grouped's with one adapter."""
    limit = LIMITS["bottleneck", "cuda", "other", torch.bfloat16]
    found = [w for w in BOTTLENECK if not limit.exceeded(w.dim, w.bottleneck)]
    found.append(Bottleneck("ViT-L/16 AdaptFormer", 128, 197, 1024, 16, cpu_batch=8))
    return found + [
        Bottleneck(f"{w.name}, one adapter", w.batch, w.tokens, w.dim, w.bottleneck, w.batch)
        for w in GROUPED
    ]


def title(w: Bottleneck) -> str:
    dim = "" if w.out_dim or w.name.endswith(f"D {w.dim}") else f", D {w.dim}"
    return f"{w.name}{dim}, r {w.bottleneck}"


def section() -> str:
    lines = [HEADING, "", INTRODUCTION.strip(), ""]
    for gpu in GPUS:
        lines += head(gpu)
        for w in predicted():
            costs = w.costs(training=True)
            for direction, counts, cost in zip(
                ("forward", "backward"), kernels(w, gpu), costs, strict=True
            ):
                lines.append(row(title(w), gpu, direction, counts, 2.0 * cost.elements))
        for g in GROUPED:
            name = f"{g.name}, {g.adapters} adapters, D {g.dim}, r {g.bottleneck}"
            for direction, counts, cost in zip(
                ("forward", "backward"),
                grouped_kernels(g, gpu),
                g.costs(training=True),
                strict=True,
            ):
                lines.append(row(name, gpu, direction, counts, 2.0 * cost.elements))
        lines.append("")
    lines += memory(GPUS[1])
    return "\n".join(lines)

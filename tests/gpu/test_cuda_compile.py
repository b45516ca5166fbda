"""The CUDA kernels compiled for each architecture: nothing spills, all fits.

PYTHONPATH=tests python tests/gpu/test_cuda_compile.py    # writes docs/cuda-resources.md
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cuda_backend
import device
import pytest
import torch
from compile_checks import PROCESSORS, Occupancy, Resources, cubin_resources, occupancy
from machine import Report

from fastadapters.ops.codes import ACTIVATION_CODES, DTYPE_CODES

TABLE = Path(__file__).parents[2] / "docs" / "cuda-resources.md"
TESTED = (80, 90, 120)
ARCHITECTURES = (*TESTED, 86, 89, 100)
DTYPES = {
    "BFloat16": "bfloat16",
    "Float16": "float16",
    "Float32<true>": "tf32",
    "Float32<false>": "float32",
}
NUMBERS = ("r", "registers", "shared", "blocks", "threads", "HMMA", "instructions")
HALVES = ("bfloat16", "float16")
# Where the kernels for rows of several adapters are tested, for the time it takes; the table has
# them for all that are.
GROUPED = (80,)

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason=device.TOOLS)


class Kernel(NamedTuple):
    """A kernel that multiplies matrices, for r up to ``width``.

    forward, backward, accumulate (backward that makes dWu, too), gradients of the parameters or
    columns (they and dx), or one of these for rows of several adapters (grouped); the dtypes of its
    products, of x (or what the gradients are products with) and of y.
    """

    kind: str
    products: str
    x: str
    y: str
    width: int


def forms() -> list[tuple[str, str, str, int]]:
    """(products, x, y, width) of the kernels there are."""
    same = [(d, d, d, width) for d in DTYPES.values() for width in (32, 64)]
    wide = itertools.product(HALVES, ("same", "float32"), ("same", "float32"))
    mixed = [
        (d, *(d if s == "same" else s for s in (x, y)), 64)
        for d, x, y in wide
        if {x, y} != {"same"}
    ]
    return same + mixed


def every(arch: int) -> set[Kernel]:
    found = set()
    for products, x, y, width in forms():
        found |= {Kernel(kind, products, x, y, width) for kind in ("forward", "backward")}
        found |= {Kernel("gradients", products, stored, "", width) for stored in (x, y)}
        if products in HALVES and (width == 32 or {x, y} != {products}):
            found.add(Kernel("accumulate", products, x, y, width))
        if products in HALVES and {x, y} == {products}:
            found.add(Kernel("columns", products, x, y, width))
        if arch in GROUPED and (products not in HALVES or width == 64):
            grouped = (
                ("forward", x, y),
                ("backward", x, y),
                ("gradients", x, ""),
                ("gradients", y, ""),
            )
            found |= {Kernel(f"grouped {k}", products, a, b, width) for k, a, b in grouped}
    return found


@functools.cache
def parse(name: str) -> Kernel | None:
    """Which kernel a mangled name means, if it multiplies anything."""
    if not re.search("data_pass|weight_pass|column_pass", name):
        return None
    plain = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    plain = plain.replace("fastadapters::cuda::", "")
    found = re.match(r"void (\w+)<(.*?)>\((?:Data|Weight|Column)Pass\)", plain)
    if found is None:
        raise ValueError(f"a kernel of a new kind: {plain}")
    products, width, *rest = found[2].strip().split(", ")
    stored = [DTYPES[s] for s in rest if s in DTYPES]
    if found[1] == "column_pass":
        return Kernel("columns", *[DTYPES[products]] * 3, int(width))
    grouped = "grouped " * (rest[-1] == "true")
    if found[1] == "weight_pass":
        return Kernel(f"{grouped}gradients", DTYPES[products], stored[0], "", int(width))
    kind = {"false false": "forward", "true false": "backward"}.get(
        " ".join(rest[:2]), "accumulate"
    )
    return Kernel(f"{grouped}{kind}", DTYPES[products], stored[0], stored[1], int(width))


@functools.cache
def of_op(op: str, arch: int) -> list[Resources]:
    """Of every kernel of an op."""
    sources = [s for s in cuda_backend.KERNELS if s.parent.name == op]
    sources = [s for s in sources if arch in GROUPED or not s.stem.startswith("grouped")]
    if op == "cross_modal_attention":
        sources = [s for s in sources if s.stem != "float16"]
    with ThreadPoolExecutor(2) as pool:
        cubins = list(pool.map(functools.partial(cuda_backend.assemble, arch=arch), sources))
    return [r for cubin in cubins if cubin for r in cubin_resources(cubin)]


@functools.cache
def resources(arch: int) -> dict[Kernel | str, Resources]:
    """Of the bottleneck, by what a kernel is, or by its mangled name if it multiplies nothing."""
    return {parse(r.name) or r.name: r for r in of_op("bottleneck", arch)}


@functools.cache
def shared(arch: int, dim: int) -> dict[Kernel, int]:
    """What the launchers ask for: bytes of shared memory of a block, at [64, dim], r = width.

    Or, where dWu is accumulated and there is room, at [320, dim], r = 16; where dx is made by
    columns, at [64, 2304].
    """
    ops = cuda_backend.load()
    asked = {}
    precision = torch.get_float32_matmul_precision()
    for *names, width in forms():
        torch.set_float32_matmul_precision("high" if names[0] == "tf32" else "highest")
        dtypes = [torch.float32 if n == "tf32" else getattr(torch, n) for n in names]
        accumulate = Kernel("accumulate", *names, width)
        columns = Kernel("columns", *names, width)
        sizes = [(64, width, dim)]
        if dim == 768 and names[0] == "bfloat16" and accumulate in every(arch):
            sizes.append((320, 16, dim))
        if columns in every(arch):
            sizes.append((64, width, 2304))
        for rows, r, d in sizes:
            x, y = (torch.zeros(rows, d, dtype=dtype) for dtype in dtypes[1:])
            down, up = x.new_zeros(r, d), x.new_zeros(d, r)
            codes = DTYPE_CODES[dtypes[0]], DTYPE_CODES[dtypes[2]], x.dtype == y.dtype
            rest = (down, None, up, None, None, None, None, None, 1.0, 1e-5, 0.0, 0.0, 1, *codes)
            z, stats = x.new_zeros(rows, r, dtype=dtypes[0]), x.new_zeros(0, dtype=torch.float32)
            with device.simulate(arch) as run:
                if (rows, d) == (64, dim):
                    ops.bottleneck_forward(x, None, *rest, True)
                ops.bottleneck_backward(y, x, z, stats, *rest, 0b1011)
            for report in run.launches:
                if kernel := parse(report.name):
                    asked.setdefault(kernel, report.shared_bytes)
        if accumulate in asked:  # and so in float16
            alike = [n.replace("bfloat16", "float16") for n in names]
            asked[Kernel("accumulate", *alike, width)] = asked[accumulate]
    torch.set_float32_matmul_precision(precision)
    for kernel in every(arch):
        if kernel.kind.startswith("grouped"):  # for which it is laid out in the same way
            asked[kernel] = asked[kernel._replace(kind=kernel.kind.split()[1])]
    return asked


@pytest.mark.parametrize("arch", TESTED)
def test_kernels_fit(arch: int) -> None:
    """Nothing spills, tensor cores multiply, two blocks share a processor; the table is current."""
    kernels = resources(arch)
    assert {k for k in kernels if isinstance(k, Kernel)} == every(arch)
    for kernel, r in kernels.items():
        assert r.spills == 0 and r.stack == 0, kernel
        expected = isinstance(kernel, Kernel) and kernel.products != "float32"
        assert bool(r.matrix.get("HMMA")) == expected, kernel
    for dim, kernel in itertools.product((768, 1024), every(arch)):
        if kernel.kind == "accumulate" and kernel not in shared(arch, dim):
            continue
        asked, registers = shared(arch, dim)[kernel], kernels[kernel].registers
        assert asked <= PROCESSORS[arch].shared_per_block
        found = occupancy(arch, registers=registers, shared=asked, threads=128)
        # fp32 rows are twice as long: too long for two where 100 KiB are shared.
        tight = kernel.width == 64 and bool({"float32", "tf32"} & {*kernel})
        tight = tight or kernel.kind == "columns"
        tight = tight and PROCESSORS[arch].shared < 128 * 1024
        least = 1 if tight or kernel.kind == "accumulate" else 2
        assert found.blocks >= least, f"{kernel}: {found}"
    text = TABLE.read_text()
    if compiler() in text:  # another version compiles to something else
        assert {*text.splitlines()}.issuperset(lines(arch)), f"run python {__file__}"


MASKED, ADDITIVE = (0.0, -math.inf, -math.inf, 0.0), (0.0, 1.0, 1.0, 0.0)
COUNTS = {  # one kernel of sequence fusion is in each of three files
    "multimodal": 12,
    "sequence_fusion": 5 * 4 + 3,
    "cross_modal_attention": 5 * 3 * 2,  # in bf16 and fp32: fp16 is alike
}


def launch_multimodal(ops: Any) -> None:
    """A training step of the widths of MMA, one of few texts and items."""
    with torch.no_grad():
        text, image = torch.randn(8, 512), torch.randn(4, 512)
        shapes = ((128, 512), (384, 128), (128, 128), (32, 128), (512, 32))
        layers = [(torch.randn(o, i) * i**-0.5, torch.zeros(o)) for o, i in shapes]
        flat = [*layers[0], None, None, *itertools.chain(*layers[1:]), None, None]
        needs = sum(1 << i for i, t in enumerate((text, image, *flat)) if t is not None)
        for bias in (MASKED, ADDITIVE):
            options = (0.2, 100.0, 4, *bias, 0, 0, 0)
            _, state = ops.multimodal_logits_forward(text, image, *flat, *options, True)
            gradient = torch.randn(4, 8)
            ops.multimodal_logits_backward(gradient, text, state, image, *flat, *options, needs)


def launch_sequence_fusion(ops: Any) -> None:
    """Training steps of the widths of Food101, in each dtype of the products, and of wider r."""
    for products, r in itertools.product(DTYPES.values(), (16, 64)):
        torch.set_float32_matmul_precision("high" if products == "tf32" else "highest")
        dtype = torch.float32 if products == "tf32" else getattr(torch, products)
        xs = [torch.zeros(1, 70, 768, dtype=dtype)] * 2
        shapes = ((r, 768), (r,), (1, 70, 16), (1, r, 768))
        parameters = (*([torch.zeros(shape)] * 2 for shape in shapes), None)
        code = DTYPE_CODES[dtype]
        options = (ACTIVATION_CODES["gelu"], code, code, False, True)
        y, p, z = ops.sequence_fusion_forward(xs, None, *parameters, *options, True)
        ops.sequence_fusion_backward(y, xs, p, z, *parameters, *options, (1 << 10) - 1)


def launch_cross_modal_attention(ops: Any) -> None:
    """Training steps with heads of each width."""
    for dtype, width in itertools.product(("bfloat16", "float32"), (32, 64, 128)):
        of = {"dtype": getattr(torch, dtype)}
        text, image = torch.zeros(8, 1, width, **of), torch.zeros(2, 1, 1, width, **of)
        tensors, options = [text] * 3 + [image] * 3, (0.3, *ADDITIVE, 3)
        *outs, state = ops.cross_modal_attention_forward(*tensors, *options, True)
        ops.cross_modal_attention_backward(*outs, *tensors, state, *options, 63)


LAUNCH = {
    "multimodal": launch_multimodal,
    "sequence_fusion": launch_sequence_fusion,
    "cross_modal_attention": launch_cross_modal_attention,
}


@functools.cache
def launched(op: str, arch: int) -> dict[str, Report]:
    """Of each kernel the launch that takes most shared memory in usual sizes, by mangled name."""
    precision, ops = torch.get_float32_matmul_precision(), cuda_backend.load()
    with device.simulate(arch) as run:
        LAUNCH[op](ops)
    torch.set_float32_matmul_precision(precision)
    return {r.name: r for r in sorted(run.launches, key=lambda r: r.shared_bytes)}


# Attention on one architecture, for the time that it takes; its table has them all.
CHECKED = [*itertools.product(("multimodal", "sequence_fusion"), TESTED)]
CHECKED += [("cross_modal_attention", 80)]


@pytest.mark.parametrize(("op", "arch"), CHECKED)
def test_kernels_of_op_fit(op: str, arch: int) -> None:
    """Nothing spills; tensor cores multiply, but in the head and in fp32; the table is current.

    Registers and shared memory let two blocks share a processor, if 100 KiB do not have to do, or
    fp32 rows in the widest parts, or the many rows in a thread of `text_images`. Attention
    multiplies tiles in two of its kernels.
    """
    kernels = of_op(op, arch)
    assert len(kernels) == COUNTS[op]
    for r in kernels:
        assert r.spills == 0 and r.stack == 0, r.name
        expected = bool(re.search("BFloat16|Float16|Float32ILb1E", r.name))
        expected &= not re.search("prepare|text_out|text_images", r.name)
        assert bool(r.matrix.get("HMMA")) == expected, r.name
        if report := launched(op, arch).get(r.name):
            tight = PROCESSORS[arch].shared < 128 * 1024 or re.search(
                "inputs.*Float32.*64E|attend_backward.*Float32.*128E|text_images", r.name
            )
            least = 1 if tight else 2
            assert fits(r, arch, report).blocks >= least, r.name
    text = TABLE.read_text()
    if compiler() in text:
        assert {*text.splitlines()}.issuperset(lines_of_op(op, arch)), f"run python {__file__}"


def compiler() -> str:
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    return f"nvcc {re.findall(r'V([0-9.]+)', version.stdout)[0]}"


def lines(arch: int) -> list[str]:
    """The table's, of one architecture."""
    found = []
    for kernel, r in sorted(resources(arch).items(), key=str):
        if isinstance(kernel, Kernel):
            asked = shared(arch, 768).get(kernel)
            if asked is None:  # no room
                continue
            fits = occupancy(arch, registers=r.registers, shared=asked, threads=128)
            cells = (f"sm_{arch}", *kernel, r.registers, asked, fits.blocks, fits.limit)
            cells = (*cells, r.matrix.get("HMMA", 0), r.instructions)
            found.append(f"| {' | '.join(map(str, cells))} |")
    return found


def plain(name: str) -> str:
    """A kernel's name as the table has it."""
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\w+)(<.*>)?\(", re.sub(r"fastadapters::cuda::(\w+::)?", "", text))
    if found is None:
        raise ValueError(f"no kernel: {text}")
    arguments = found[2] or ""
    for dtype, short in DTYPES.items():
        arguments = arguments.replace(dtype, short)
    return found[1] + arguments.replace("<", " ").replace(">", "")


def fits(r: Resources, arch: int, report: Report) -> Occupancy:
    shared, threads = r.shared + report.shared_bytes, report.block[0]
    return occupancy(arch, registers=r.registers, shared=shared, threads=threads)


def lines_of_op(op: str, arch: int) -> list[str]:
    found = []
    for r in sorted(of_op(op, arch), key=lambda r: plain(r.name)):
        cells: list[object] = [f"sm_{arch}", plain(r.name), r.registers]
        if report := launched(op, arch).get(r.name):
            of = fits(r, arch, report)
            cells += [report.block[0], r.shared + report.shared_bytes, of.blocks, of.limit]
        else:
            cells += ["", "", "", ""]
        cells += [r.matrix.get("HMMA", 0), r.instructions]
        found.append(f"| {' | '.join(map(str, cells))} |")
    return found


def heading(columns: tuple[str, ...]) -> list[str]:
    rule = "|".join("---:" if c in NUMBERS else "---" for c in columns)
    return [f"| {' | '.join(columns)} |", f"|{rule}|"]


def table() -> str:
    of_bottleneck = ("arch", "kernel", "products", "x", "y", *NUMBERS[:3], "blocks", "limit")
    of_others = ("arch", "kernel", "registers", "threads", "shared", "blocks", "limit")
    rest = ("HMMA", "instructions")
    lines_of = [
        "# What the CUDA kernels take",
        "",
        f"Compiled by {compiler()}. Registers: of a thread; shared: bytes of a block; blocks: on a",
        "multiprocessor. Nothing spills. Written by tests/gpu/test_cuda_compile.py.",
        "",
        "## Bottleneck",
        "",
        "Shared memory as the launchers ask for it at D = 768. r is the largest whose h is one",
        "part; wider ones go part by part. Gradients are products with x or with dy, whose dtype",
        "is named. `accumulate`: a backward that makes dWu, too, in one block on a multiprocessor,",
        "its shared memory at r = 16; where it is missing it has no room. `grouped`: for rows of",
        f"several adapters, on {', '.join(f'sm_{arch}' for arch in TESTED)}. 128 threads a block.",
        "",
        *heading((*of_bottleneck, *rest)),
        *itertools.chain(*map(lines, sorted(ARCHITECTURES))),
    ]
    titles = {
        "multimodal": "The multi-modal adapter's head, at D 512, E 128, R 32, 4 heads",
        "sequence_fusion": "Sequence fusion, at D 768, r 16 and 64",
        "cross_modal_attention": "Cross-modal attention, heads up to 32, 64, 128; fp16 as bf16",
    }
    for op, title in titles.items():
        lines_of += ["", f"## {title}", "", *heading((*of_others, *rest))]
        for arch in sorted(ARCHITECTURES):
            lines_of += lines_of_op(op, arch)
    return "\n".join(lines_of) + "\n"


if __name__ == "__main__":
    GROUPED = TESTED
    with device.arena():
        TABLE.write_text(table())

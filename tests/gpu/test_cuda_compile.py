"""The CUDA kernels compiled for each architecture: nothing spills, all fits.

python tests/gpu/test_cuda_compile.py    # writes docs/cuda-resources.md
"""

from __future__ import annotations

import functools
import itertools
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cuda_backend
import device
import pytest
import torch
from compile_checks import PROCESSORS, Resources, cubin_resources, occupancy

from fastadapters.ops.codes import DTYPE_CODES

TABLE = Path(__file__).parents[2] / "docs" / "cuda-resources.md"
TESTED = (80, 90, 120)
ARCHITECTURES = (*TESTED, 86, 89, 100)
DTYPES = {
    "BFloat16": "bfloat16",
    "Float16": "float16",
    "Float32<true>": "tf32",
    "Float32<false>": "float32",
}
NUMBERS = ("r", "registers", "shared", "blocks", "HMMA", "instructions")
HALVES = ("bfloat16", "float16")

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason=device.TOOLS)


class Kernel(NamedTuple):
    """A kernel that multiplies matrices, for r up to ``width``.

    forward, backward, or gradients of the parameters; the dtypes of its products, of x (or what the
    gradients are products with) and of y.
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


def every() -> set[Kernel]:
    found = set()
    for products, x, y, width in forms():
        found |= {Kernel(kind, products, x, y, width) for kind in ("forward", "backward")}
        found |= {Kernel("gradients", products, stored, "", width) for stored in (x, y)}
    return found


@functools.cache
def parse(name: str) -> Kernel | None:
    """Which kernel a mangled name means, if it multiplies anything."""
    if not re.search("data_pass|weight_pass", name):
        return None
    plain = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    plain = plain.replace("fastadapters::cuda::", "")
    found = re.match(r"void (\w+)<(.*?)>\((?:DataPass|WeightPass)\)", plain)
    if found is None:
        raise ValueError(f"a kernel of a new kind: {plain}")
    products, width, *rest = found[2].strip().split(", ")
    stored = [DTYPES[s] for s in rest if s in DTYPES]
    if found[1] == "weight_pass":
        return Kernel("gradients", DTYPES[products], stored[0], "", int(width))
    kind = "backward" if rest[0] == "true" else "forward"
    return Kernel(kind, DTYPES[products], stored[0], stored[1], int(width))


@functools.cache
def compiled(architectures: tuple[int, ...]) -> dict[str, list[Resources]]:
    """Of every kernel, by op. Its code is the same for all architectures, up to the assembler."""
    codes = ",".join(f"sm_{arch}" for arch in architectures)
    command = [*cuda_backend.NVCC, f"-gencode=arch=compute_80,code=[{codes}]"]
    with ThreadPoolExecutor(2) as pool:
        compile_source = functools.partial(cuda_backend.compile_source, command, suffix="-sm")
        objects = list(pool.map(compile_source, cuda_backend.KERNELS))
    found: dict[str, list[Resources]] = {}
    for source, built in zip(cuda_backend.KERNELS, objects, strict=True):
        found.setdefault(source.parent.name, []).extend(cubin_resources(built))
    return found


@functools.cache
def of_op(op: str, arch: int) -> list[Resources]:
    found = compiled(TESTED if arch in TESTED else ARCHITECTURES)
    return [r for r in found[op] if r.arch == f"sm_{arch}"]


@functools.cache
def resources(arch: int) -> dict[Kernel | str, Resources]:
    """Of the bottleneck, by what a kernel is, or by its mangled name if it multiplies nothing."""
    return {parse(r.name) or r.name: r for r in of_op("bottleneck", arch)}


@functools.cache
def shared(arch: int, dim: int) -> dict[Kernel, int]:
    """What the launchers ask for: bytes of shared memory of a block, at [64, dim], r = width."""
    ops = cuda_backend.load()
    asked = {}
    precision = torch.get_float32_matmul_precision()
    for *names, width in forms():
        torch.set_float32_matmul_precision("high" if names[0] == "tf32" else "highest")
        dtypes = [torch.float32 if n == "tf32" else getattr(torch, n) for n in names]
        x, y = (torch.zeros(64, dim, dtype=dtype) for dtype in dtypes[1:])
        down, up = x.new_zeros(width, dim), x.new_zeros(dim, width)
        codes = DTYPE_CODES[dtypes[0]], DTYPE_CODES[dtypes[2]], x.dtype == y.dtype
        rest = (down, None, up, None, None, None, None, None, 1.0, 1e-5, 0.0, 1, *codes)
        with device.simulate(arch) as run:
            _, z, stats = ops.bottleneck_forward(x, None, *rest, True)
            ops.bottleneck_backward(y, x, z, stats, *rest, 0b1011)
        for report in run.launches:
            if kernel := parse(report.name):
                asked[kernel] = report.shared_bytes
    torch.set_float32_matmul_precision(precision)
    return asked


@pytest.mark.parametrize("arch", TESTED)
def test_kernels_fit(arch: int) -> None:
    """Nothing spills, tensor cores multiply, two blocks share a processor; the table is current."""
    kernels = resources(arch)
    assert {k for k in kernels if isinstance(k, Kernel)} == every()
    for kernel, r in kernels.items():
        assert r.spills == 0 and r.stack == 0, kernel
        expected = isinstance(kernel, Kernel) and kernel.products != "float32"
        assert bool(r.matrix.get("HMMA")) == expected, kernel
    for dim, kernel in itertools.product((768, 1024), every()):
        asked, registers = shared(arch, dim)[kernel], kernels[kernel].registers
        assert asked <= PROCESSORS[arch].shared_per_block
        found = occupancy(arch, registers=registers, shared=asked, threads=128)
        # fp32 rows are twice as long: too long for two where 100 KiB are shared.
        tight = kernel.width == 64 and bool({"float32", "tf32"} & {*kernel})
        least = 1 if tight and PROCESSORS[arch].shared < 128 * 1024 else 2
        assert found.blocks >= least, f"{kernel}: {found}"
    text = TABLE.read_text()
    if compiler() in text:  # another version compiles to something else
        expected = [line for line in text.splitlines() if line.startswith(f"| sm_{arch} ")]
        assert lines(arch) == expected, f"run python {__file__}"


@pytest.mark.parametrize("arch", TESTED)
def test_sequence_fusion_fits(arch: int) -> None:
    """Nothing spills, and tensor cores multiply, but in fp32; two blocks have their registers."""
    kernels = of_op("sequence_fusion", arch)
    multiplying = [r for r in kernels if re.search("BFloat16|Float16|Float32", r.name)]
    assert len(multiplying) == 5 * 3
    for r in kernels:
        assert r.spills == 0 and r.stack == 0, r.name
        expected = r in multiplying and "Float32ILb0E" not in r.name
        assert bool(r.matrix.get("HMMA")) == expected, r.name
        threads = 128 if r in multiplying else 256
        assert occupancy(arch, registers=r.registers, shared=r.shared, threads=threads).blocks >= 2


@pytest.mark.parametrize("arch", TESTED)
def test_head_fits(arch: int) -> None:
    """No kernel of the head spills, and registers let two blocks share a processor."""
    kernels = of_op("multimodal", arch)
    assert len(kernels) == 14
    for r in kernels:
        assert r.spills == 0 and r.stack == 0, r.name
        assert r.registers <= (128 if "rows_" in r.name or "hidden_" in r.name else 255), r.name


def compiler() -> str:
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    return f"nvcc {re.findall(r'V([0-9.]+)', version.stdout)[0]}"


def lines(arch: int) -> list[str]:
    """The table's, of one architecture."""
    found = []
    for kernel, r in sorted(resources(arch).items(), key=str):
        if isinstance(kernel, Kernel):
            asked = shared(arch, 768)[kernel]
            fits = occupancy(arch, registers=r.registers, shared=asked, threads=128)
            cells = (f"sm_{arch}", *kernel, r.registers, asked, fits.blocks, fits.limit)
            cells = (*cells, r.matrix.get("HMMA", 0), r.instructions)
            found.append(f"| {' | '.join(map(str, cells))} |")
    return found


def table() -> str:
    columns = (
        "arch",
        "kernel",
        "products",
        "x",
        "y",
        "r",
        "registers",
        "shared",
        "blocks",
        "limit",
    )
    columns = (*columns, "HMMA", "instructions")
    head = [
        "# What the CUDA bottleneck kernels take",
        "",
        f"Compiled by {compiler()}; shared memory as the launchers ask for it at D = 768. r is the",
        "largest whose h is one part; wider ones go part by part. Gradients are products with x or",
        "with dy, whose dtype is named. Registers: of a thread; shared: bytes of a block of",
        "128 threads; blocks: on a multiprocessor. Nothing spills to memory.",
        "Written by tests/gpu/test_cuda_compile.py.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'|'.join('---:' if c in NUMBERS else '---' for c in columns)}|",
    ]
    return "\n".join([*head, *itertools.chain(*map(lines, sorted(ARCHITECTURES)))]) + "\n"


if __name__ == "__main__":
    with device.arena():
        TABLE.write_text(table())

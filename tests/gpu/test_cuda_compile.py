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

from fastadapters.ops.bottleneck import DTYPE_CODES

TABLE = Path(__file__).parents[2] / "docs" / "cuda-resources.md"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TESTED = (80, 90, 100, 120)  # 86 and 89 have the code of 80, and less shared memory
ELEMENTS = {
    "8BFloat16": "bfloat16",
    "7Float16": "float16",
    "7Float32ILb1E": "tf32",
    "7Float32ILb0E": "float32",
}
KERNELS = {
    r"data_pass.*Li\d+ELb0E": "forward",
    r"data_pass.*Li\d+ELb1E": "backward",
    "weight_pass": "gradients",
}


pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason=device.TOOLS)


class Kernel(NamedTuple):
    """A kernel that multiplies matrices: forward, backward or gradients, for r up to ``width``."""

    kind: str
    element: str
    width: int


def parse(name: str) -> Kernel | None:
    kind = next((k for pattern, k in KERNELS.items() if re.search(pattern, name)), None)
    if kind is None:
        return None
    element = next(e for pattern, e in ELEMENTS.items() if pattern in name)
    return Kernel(kind, element, int(re.findall(r"Li(32|64)E", name)[0]))


@functools.cache
def resources(arch: int) -> dict[Kernel | str, Resources]:
    """Of every kernel, by what it is, or by its mangled name if it multiplies nothing."""
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [*cuda_backend.NVCC, code, "-c", str(cuda_backend.KERNELS)]
    compiled = cuda_backend.compile_once(command, f"sm_{arch}.o")
    return {parse(r.name) or r.name: r for r in cubin_resources(compiled)}


@functools.cache
def shared(arch: int, dim: int) -> dict[Kernel, int]:
    """What the launchers ask for: bytes of shared memory of a block, at [64, dim], r = width."""
    ops = cuda_backend.load()
    asked = {}
    precision = torch.get_float32_matmul_precision()
    for element in ELEMENTS.values():
        dtype = torch.float32 if element == "tf32" else getattr(torch, element)
        torch.set_float32_matmul_precision("high" if element == "tf32" else "highest")
        for width in (32, 64):
            x, codes = torch.zeros(64, dim, dtype=dtype), (DTYPE_CODES[dtype],) * 2
            down, up = x.new_zeros(width, dim), x.new_zeros(dim, width)
            rest = (down, None, up, None, None, None, None, None, 1.0, 1e-5, 0.0, 1, *codes, True)
            with device.simulate(arch) as run:
                _, z, stats = ops.bottleneck_forward(x, None, *rest, True)
                ops.bottleneck_backward(x, x, z, stats, *rest, 0b1011)
            for report in run.launches:
                if kernel := parse(report.name):
                    asked[kernel] = report.shared_bytes
    torch.set_float32_matmul_precision(precision)
    return asked


@pytest.mark.parametrize("arch", TESTED)
def test_kernels_fit(arch: int) -> None:
    """Nothing spills, tensor cores multiply, two blocks share a processor; the table is current."""
    kernels = resources(arch)
    every = {Kernel(*k) for k in itertools.product(KERNELS.values(), ELEMENTS.values(), (32, 64))}
    assert {k for k in kernels if isinstance(k, Kernel)} == every
    for kernel, r in kernels.items():
        assert r.spills == 0 and r.stack == 0, kernel
        expected = isinstance(kernel, Kernel) and kernel.element != "float32"
        assert bool(r.matrix.get("HMMA")) == expected, kernel
    for dim, kernel in itertools.product((768, 1024), every):
        asked, registers = shared(arch, dim)[kernel], kernels[kernel].registers
        assert asked <= PROCESSORS[arch].shared_per_block
        found = occupancy(arch, registers=registers, shared=asked, threads=128)
        # fp32 rows of h are twice as long: too long for two where 100 KiB are shared.
        tight = kernel.element in ("tf32", "float32") and kernel.width == 64
        least = 1 if tight and PROCESSORS[arch].shared < 128 * 1024 else 2
        assert found.blocks >= least, f"{kernel}: {found}"
    text = TABLE.read_text()
    if compiler() in text:  # another version compiles to something else
        expected = [line for line in text.splitlines() if line.startswith(f"| sm_{arch} ")]
        assert lines(arch) == expected, f"run python {__file__}"


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
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(resources, ARCHITECTURES))
    head = [
        "# What the CUDA bottleneck kernels take",
        "",
        f"Compiled by {compiler()}; shared memory as the launchers ask for it at D = 768. r is the",
        "largest whose h is one part; wider ones go part by part. Registers: of a thread; shared:",
        "bytes of a block of 128 threads; blocks: on a multiprocessor. Nothing spills to memory.",
        "Written by tests/gpu/test_cuda_compile.py.",
        "",
        "| arch | kernel | x | r | registers | shared | blocks | limit | HMMA | instructions |",
        "|---|---|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    return "\n".join([*head, *itertools.chain(*map(lines, ARCHITECTURES))]) + "\n"


if __name__ == "__main__":
    with device.arena():
        TABLE.write_text(table())

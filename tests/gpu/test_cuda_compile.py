"""The CUDA kernels as the library has them, for every architecture: nothing spills, all fits.

python tests/gpu/test_cuda_compile.py    # writes docs/cuda-resources.md
"""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import device
import pytest
import torch
from compile_checks import PROCESSORS, Resources, cubin_resources, occupancy

from fastadapters import backends

TABLE = Path(__file__).parents[2] / "docs" / "cuda-resources.md"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
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


def built_with_cuda() -> bool:
    return backends.has_kernel("bottleneck_forward", "CUDA")


pytestmark = [
    pytest.mark.skipif(not built_with_cuda(), reason="the library was built without CUDA"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason=device.TOOLS),
]


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
def resources() -> dict[int, dict[str, Resources]]:
    """Of every kernel in the library, by architecture and mangled name."""
    found: dict[int, dict[str, Resources]] = {}
    for r in cubin_resources(backends.LIBRARY):
        found.setdefault(int(re.sub(r"\D", "", r.arch)), {})[r.name] = r
    return found


@functools.cache
def shared(arch: int, dim: int) -> dict[Kernel, int]:
    """What the launchers ask for: bytes of shared memory of a block, at [64, dim], r = width."""
    import cuda_backend

    ops = cuda_backend.load()
    asked = {}
    precision = torch.get_float32_matmul_precision()
    for element in ELEMENTS.values():
        dtype = torch.float32 if element == "tf32" else getattr(torch, element)
        torch.set_float32_matmul_precision("high" if element == "tf32" else "highest")
        for width in (32, 64):
            x = torch.zeros(64, dim, dtype=dtype)
            down, up = x.new_zeros(width, dim), x.new_zeros(dim, width)
            rest = (down, None, up, None, None, None, None, None, 1.0, 1e-5, 0.0, 1, True)
            with device.simulate(arch) as run:
                _, z, stats = ops.bottleneck_forward(x, None, *rest, True)
                ops.bottleneck_backward(x, x, z, stats, *rest, 0b1011)
            for report in run.launches:
                if kernel := parse(report.name):
                    asked[kernel] = report.shared_bytes
    torch.set_float32_matmul_precision(precision)
    return asked


def test_every_architecture_has_every_kernel() -> None:
    compiled = resources()
    assert set(ARCHITECTURES) <= set(compiled)
    names = set(compiled[80])
    assert all(set(kernels) == names for kernels in compiled.values())
    assert len([n for n in names if parse(n)]) == len(KERNELS) * len(ELEMENTS) * 2


def test_nothing_spills() -> None:
    for arch, kernels in resources().items():
        for name, r in kernels.items():
            assert r.spills == 0 and r.stack == 0, f"sm_{arch} {name}"


def test_tensor_cores_multiply() -> None:
    for arch, kernels in resources().items():
        for name, r in kernels.items():
            kernel = parse(name)
            expected = kernel is not None and kernel.element != "float32"
            assert bool(r.matrix.get("HMMA")) == expected, f"sm_{arch} {name}"


@pytest.mark.parametrize("dim", [768, 1024])
def test_two_blocks_share_a_processor(dim: int) -> None:
    for arch in ARCHITECTURES:
        for name, r in resources()[arch].items():
            if kernel := parse(name):
                bytes_asked = shared(arch, dim)[kernel]
                assert bytes_asked <= PROCESSORS[arch].shared_per_block
                found = occupancy(arch, registers=r.registers, shared=bytes_asked, threads=128)
                # fp32 rows of h are twice as long: too long for two where 100 KiB are shared.
                tight = kernel.element in ("tf32", "float32") and kernel.width == 64
                least = 1 if tight and PROCESSORS[arch].shared < 128 * 1024 else 2
                assert found.blocks >= least, f"sm_{arch} {name}: {found}"


def table() -> str:
    lines = [
        "# What the CUDA bottleneck kernels take",
        "",
        "Compiled by the nvcc that built the library; shared memory as the launchers ask for it",
        "at D = 768. r is the largest whose h is one part; wider ones go part by part. Registers:",
        "of a thread; shared: bytes of a block of 128 threads; blocks: on a multiprocessor.",
        "Nothing spills to memory. Written by tests/gpu/test_cuda_compile.py.",
        "",
        "| arch | kernel | x | r | registers | shared | blocks | limit | HMMA | instructions |",
        "|---|---|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    for arch in ARCHITECTURES:
        for name, r in sorted(resources()[arch].items(), key=lambda item: str(parse(item[0]))):
            if kernel := parse(name):
                asked = shared(arch, 768)[kernel]
                fits = occupancy(arch, registers=r.registers, shared=asked, threads=128)
                cells = (f"sm_{arch}", *kernel, r.registers, asked, fits.blocks, fits.limit)
                cells = (*cells, r.matrix.get("HMMA", 0), r.instructions)
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with device.arena():
        TABLE.write_text(table())

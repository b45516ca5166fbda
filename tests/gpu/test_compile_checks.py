"""The readers of compiled code, on a kernel with tensor-core code and one that must spill."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import compile_checks
import device
import pytest

SPILLING = """
__global__ void __launch_bounds__(1024) spilling(const volatile float* x, volatile float* y) {
  float v[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) v[i] = x[threadIdx.x * 96 + i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) y[i * 1024 + threadIdx.x] = v[i] + 2 * v[(i + 41) % 96];
}
"""


def compiled(source: pathlib.Path, folder: pathlib.Path) -> list[compile_checks.Resources]:
    if shutil.which("nvcc") is None:
        pytest.skip(device.TOOLS)
    target = folder / "kernels.o"
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a")]
    subprocess.run(["nvcc", "-std=c++17", *codes, "-c", source, "-o", target], check=True)
    return compile_checks.cubin_resources(target)


def test_tensor_core_kernel(tmp_path: pathlib.Path) -> None:
    found = compiled(pathlib.Path(__file__).with_name("zoo.cu"), tmp_path)
    products = [r for r in found if "7product" in r.name]
    assert {r.arch for r in products} == {"sm_80", "sm_90a"}
    for r in products:
        assert r.matrix == {"HMMA": 16} and r.spills == r.stack == 0
        assert r.shared == 4 * 64 * 32 * 2 and 32 < r.registers <= 255


def test_spills_are_seen(tmp_path: pathlib.Path) -> None:
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    for r in compiled(source, tmp_path):
        assert r.spills > 0 and r.stack > 0 and r.registers <= 64 and not r.matrix


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "blocks", "limit"),
    [
        (80, 128, 32_768, 128, 4, "registers"),
        (80, 32, 0, 256, 8, "threads"),
        (80, 32, 81_920, 128, 2, "shared memory"),
        (90, 16, 0, 32, 32, "blocks"),
        (120, 64, 101_376, 128, 1, "shared memory"),
        (120, 64, 101_377, 128, 0, "shared memory"),
    ],
)
def test_occupancy(
    arch: int, registers: int, shared: int, threads: int, blocks: int, limit: str
) -> None:
    found = compile_checks.occupancy(arch, registers=registers, shared=shared, threads=threads)
    assert (found.blocks, found.limit) == (blocks, limit)

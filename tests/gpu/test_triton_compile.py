"""Every tile of the Triton kernels, compiled for every architecture: nothing spills, all fits.

python tests/gpu/test_triton_compile.py    # writes docs/triton-resources.md
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from compile_checks import Resources, occupancy, triton_resources

from fastadapters.ops.codes import DTYPE_CODES

triton = pytest.importorskip("triton")

TABLE = Path(__file__).parents[2] / "docs" / "triton-resources.md"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# The most shared memory of a program. sm_86 and sm_89 run sm_80's tiles.
SHARED = dict(zip(ARCHITECTURES, (101_376, 232_448, 232_448, 101_376, 65_536), strict=True))
MATRIX = dict(zip(ARCHITECTURES, ("HMMA", "HGMMA", "UTCHMMA", "HMMA", "v_mfma"), strict=True))
PRODUCTS = ("forward_kernel", "backward_kernel", "weights_kernel")
EVERYTHING, PLAIN = "every option", "plain"
BF16, FP32 = torch.bfloat16, torch.float32


class Compiled(NamedTuple):
    """One kernel: dtypes, largest r that shares its code, options, launch options, result."""

    kernel: str
    dtypes: str
    r: int
    options: str
    meta: dict[str, Any]
    resources: Resources

    @property
    def threads(self) -> int:
        return int(self.meta.get("num_warps", 4)) * 32


class Step(NamedTuple):
    """A training step: dtypes of x, of the products and of y, r, options."""

    x: torch.dtype
    compute: torch.dtype
    y: torch.dtype
    r: int
    options: str

    @property
    def dtypes(self) -> str:
        """As in "bfloat16", or of x, products and y."""
        names = [str(t).removeprefix("torch.") for t in (self.x, self.compute, self.y)]
        return names[0] if len({*names}) == 1 else " ".join(names)


def steps(arch: str) -> list[Step]:
    """What compiles to every tile, and with other instructions."""
    found = [Step(BF16, BF16, BF16, r, EVERYTHING) for r in (32, 64, 128)]
    found += [Step(FP32, BF16, FP32, r, EVERYTHING) for r in (64, 128)]
    found.append(Step(FP32, FP32, FP32, 64, EVERYTHING))
    if arch in ("sm_80", "sm_90"):
        found.append(Step(BF16, BF16, BF16, 64, PLAIN))
    return found


def training_step(step: Step) -> None:
    """Launch every kernel: with each option there is and fp32 parameters, or with biases alone."""
    from fastadapters.kernels import bottleneck as kernels

    d, m, r, full = 768, 256, step.r, step.options == EVERYTHING
    x, dy = (torch.empty(m, d, dtype=dtype) for dtype in (step.x, step.y))
    shapes = [(r, d), (r,), (d, r), (d,), (d,), (d,), (d,)]
    parameters: list[Any] = [torch.empty(s, dtype=FP32 if full else step.compute) for s in shapes]
    if not full:
        parameters[4:] = [None] * 3
    seed = torch.empty(2, dtype=torch.int64) if full else None
    codes = DTYPE_CODES[step.compute], DTYPE_CODES[step.y]
    rest = (*parameters, seed, 1.0, 1e-5, 0.1 if full else 0.0, 2, *codes, step.x == step.y)
    residual = None if step.x == step.y else dy
    _, z, stats = kernels.bottleneck_forward(x, residual, *rest, True)
    kernels.bottleneck_backward(dy, x, z, stats, *rest, 255)


def compile_for(arch: str) -> list[Compiled]:
    """What the launches of training steps compile to; run in a process of its own."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime.jit import JITFunction

    amd = arch.startswith("gfx")

    class Driver(DriverBase):
        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch[3:]), 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

        def map_python_to_cpp_type(self, kind: str) -> str:
            return kind

    results: list[Compiled] = []
    seen = set()
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **meta: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **meta)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            key = (self.__name__, step.dtypes, step.r, step.options)
            results.append(Compiled(*key, meta, triton_resources(kernel)))
        return kernel

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only
    for step in steps(arch):
        training_step(step)
    return results


def compile_for_all(architectures: Sequence[str]) -> list[list[Compiled]]:
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        return pool.map(compile_for, architectures, chunksize=1)


def lines(arch: str, kernels: list[Compiled]) -> list[str]:
    """The table's, of one architecture."""
    found = []
    for c in kernels:
        r = c.resources
        fit = ("", "")
        if arch.startswith("sm_"):
            o = occupancy(int(arch[3:]), registers=r.registers, shared=r.shared, threads=c.threads)
            fit = (str(o.blocks), o.limit)
        block = f"{c.meta.get('BLOCK_M', '')} x {c.meta['BLOCK_D']}"
        cells = (
            arch, c.kernel.removesuffix("_kernel"), c.dtypes, c.r, c.options, block,
            c.threads // 32, c.meta.get("num_stages", ""), r.registers, r.shared, *fit,
        )  # fmt: skip
        found.append(f"| {' | '.join(map(str, cells))} |")
    return found


def table() -> str:
    """docs/triton-resources.md"""
    head = [
        "# What the Triton bottleneck kernels take",
        "",
        f"Compiled by Triton {triton.__version__} for x [256, 768]; r is the largest that runs the",
        "code; dtypes: of x, products and y, or of all. `plain` is biases and a residual; `every",
        "option` adds LayerNorm, dropout, scales per channel and fp32 parameters. Registers: of a",
        "thread; shared: bytes of a program; programs: resident on a multiprocessor. Nothing",
        "spills to memory. Written by tests/gpu/test_triton_compile.py.",
        "",
        "| arch | kernel | dtypes | r | options | BLOCK_M x BLOCK_D | warps | stages | registers |"
        " shared | programs | limit |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = map(lines, ARCHITECTURES, compile_for_all(ARCHITECTURES))
    return "\n".join([*head, *itertools.chain(*rows)]) + "\n"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiles_fit(arch: str) -> None:
    """Nothing spills, tensor cores multiply, and the table is current."""
    (kernels,) = compile_for_all([arch])
    assert {c.kernel for c in kernels} >= {*PRODUCTS, "norm_kernel", "reduce_kernel"}
    for c in kernels:
        r = c.resources
        # AMD's scalar registers spill into lanes of vector registers: no memory, so `stack` tells.
        assert r.stack == 0 and (r.spills == 0 or arch == "gfx942"), c
        assert r.shared <= SHARED[arch], c
        on_matrix_cores = c.dtypes != "float32" or arch == "gfx942"
        if c.kernel in PRODUCTS:
            assert (MATRIX[arch] in r.matrix) == on_matrix_cores, c
    text = TABLE.read_text()
    if f"Triton {triton.__version__} " in text:  # another version compiles to something else
        expected = [line for line in text.splitlines() if line.startswith(f"| {arch} ")]
        assert lines(arch, kernels) == expected, f"run python {__file__}"


if __name__ == "__main__":
    TABLE.write_text(table())

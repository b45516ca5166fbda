"""Triton kernels compiled for every architecture, without a GPU.

python tests/gpu/triton_compile.py    # writes the tables of docs/triton-resources.md
python tests/gpu/triton_compile.py multimodal    # ... of one op
"""

from __future__ import annotations

import itertools
import multiprocessing
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from compile_checks import Resources, occupancy, triton_resources
from triton_steps import OPS, Step

TABLE = Path(__file__).parents[2] / "docs" / "triton-resources.md"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# The most shared memory of a program. sm_86 and sm_89 run sm_80's tiles.
SHARED = dict(zip(ARCHITECTURES, (101_376, 232_448, 232_448, 101_376, 65_536), strict=True))
MATRIX = dict(zip(ARCHITECTURES, ("HMMA", "HGMMA", "UTCHMMA", "HMMA", "v_mfma"), strict=True))
# Kernels with a product of tiles in compute dtype.
PRODUCTS = {
    "bottleneck": {"forward", "backward", "weights"},
    "dropout_in_front": {"forward", "backward", "weights"},
    "grouped": {"forward", "backward", "weights"},
    "multimodal": set(),  # in fp32 always
    "cross_modal_attention": {
        "texts", "image_out", "text_queries", "image_queries", "text_keys", "image_keys",
    },
    "sequence_fusion": {"combine", "fuse", "factors", "tokens", "inputs"},
}  # fmt: skip


class Compiled(NamedTuple):
    """One kernel: the first step that runs its code, launch options, result."""

    kernel: str
    step: Step
    meta: dict[str, Any]
    resources: Resources

    @property
    def threads(self) -> int:
        return int(self.meta.get("num_warps", 4)) * 32


def compile_here(op: str, arch: str) -> list[Compiled]:
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
        name = self.__name__.removesuffix("_kernel")
        if step.kernels and name not in step.kernels:
            return None
        kernel = launch(self, *args, grid=grid, warmup=True, **meta)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            results.append(Compiled(name, step, meta, triton_resources(kernel)))
        return kernel

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only
    for step in OPS[op](arch):
        step.launch()
    return results


def compile_for(pairs: list[tuple[str, str]]) -> list[list[Compiled]]:
    """For each op and architecture."""
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        return pool.starmap(compile_here, pairs, chunksize=1)


def _blocks(op: str, meta: dict[str, Any]) -> str:
    if "BLOCK_D" in meta and op in ("bottleneck", "dropout_in_front", "grouped"):
        return f"{meta.get('BLOCK_M', '')} x {meta['BLOCK_D']}"
    sizes = {k.removeprefix("BLOCK_"): n for k, n in meta.items() if k.startswith("BLOCK")}
    return ", ".join(f"{name} {n}" if name != "BLOCK" else str(n) for name, n in sizes.items())


def lines(op: str, arch: str, kernels: list[Compiled]) -> list[str]:
    """The table's, of one op and architecture."""
    found = []
    for c in kernels:
        r = c.resources
        fit = ("", "")
        if arch.startswith("sm_"):
            o = occupancy(int(arch[3:]), registers=r.registers, shared=r.shared, threads=c.threads)
            fit = (str(o.blocks), o.limit)
        cells = (
            arch, c.kernel, c.step.dtypes, c.step.size, c.step.options, _blocks(op, c.meta),
            c.threads // 32, c.meta.get("num_stages", ""), r.registers, r.shared, *fit,
        )  # fmt: skip
        found.append(f"| {' | '.join(map(str, cells))} |")
    return found


def section(text: str, title: str) -> tuple[str, str, str]:
    """What is before a section of the document, the section, and what is behind it."""
    start = text.index(f"## {title}\n")
    end = text.find("\n## ", start)
    end = len(text) if end < 0 else end
    return text[:start], text[start:end], text[end:]


def check(op: str, arch: str) -> None:
    """Nothing spills but what the document says, tensor cores multiply, the table is current."""
    (kernels,) = compile_for([(op, arch)])
    assert {c.kernel for c in kernels} >= PRODUCTS[op]
    text = TABLE.read_text()
    spilling = re.findall(r"^\| (\d.*) \| (\d+) \|$", section(text, "what spills")[1], re.MULTILINE)
    allowed = {key: int(most) for key, most in spilling}
    for c in kernels:
        r = c.resources
        # AMD's scalar registers spill into lanes of vector registers: no memory, so `stack` tells.
        key = (triton.__version__, arch, op, c.kernel, c.step.dtypes, c.step.size)
        most = allowed.get(" | ".join(map(str, key)), 0)
        assert r.stack <= most and (r.spills == 0 or most or arch == "gfx942"), c
        assert r.shared <= SHARED[arch], c
        if c.kernel in PRODUCTS[op]:
            # Where there are too few rows for the warp groups of newer tensor cores, the old ones.
            on_matrix_cores = bool({MATRIX[arch], "HMMA"} & {*r.matrix})
            assert on_matrix_cores == (not c.step.ieee or arch == "gfx942"), c
    if f"Triton {triton.__version__} " in text:  # another version compiles to something else
        rows = section(text, op)[1].splitlines()
        expected = [line for line in rows if line.startswith(f"| {arch} ")]
        assert lines(op, arch, kernels) == expected, f"run python {__file__}"


def write(ops: Sequence[str]) -> None:
    """The tables of these ops anew: a section's text stays."""
    pairs = list(itertools.product(ops, ARCHITECTURES))
    compiled = dict(zip(pairs, compile_for(pairs), strict=True))
    compiler = f"Compiled by Triton {triton.__version__} "
    text = re.sub(r"Compiled by Triton [\d.]+ ", compiler, TABLE.read_text())
    for op in ops:
        before, own, after = section(text, op)
        kept = [line for line in own.splitlines() if not re.match(r"\| (sm_|gfx)", line)]
        at = next(i for i, line in enumerate(kept) if line.startswith("|---")) + 1
        rows = [line for arch in ARCHITECTURES for line in lines(op, arch, compiled[op, arch])]
        text = before + "\n".join([*kept[:at], *rows, *kept[at:]]) + "\n" + after
    TABLE.write_text(text)


if __name__ == "__main__":
    write(sys.argv[1:] or [*OPS])

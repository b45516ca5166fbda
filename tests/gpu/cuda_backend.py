"""The library's CUDA backend as operators on CPU tensors, run as it ships on the PTX machine."""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import device
import torch
from machine import HERE, build
from setup_script import load_setup

from fastadapters import ops

NAMESPACE = "fastadapters_simulated"
CSRC = HERE.parents[1] / "csrc"
KERNELS = sorted((CSRC / "cuda").rglob("*.cu"))
ARCHITECTURES = (80, 90)  # which run the same code, with shared memory of their own
NVCC = ["nvcc", "-O3", "-std=c++17", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden"]
PTX = [*NVCC, "-gencode=arch=compute_80,code=compute_80"]


def compile_once(
    command: list[str], name: str, inputs: Iterable[pathlib.Path] = ()
) -> pathlib.Path:
    """Runs a compiler, once for what goes into it; the path of the object or library."""

    def make(target: str) -> None:
        subprocess.run([*command, "-o", target], check=True)

    return build(name, command, inputs, make)


def compile_source(command: list[str], source: pathlib.Path, suffix: str = "") -> pathlib.Path:
    """The object of a file of csrc/."""
    name = "-".join(source.relative_to(CSRC).with_suffix("").parts) + suffix
    headers = load_setup().included(source)
    return compile_once([*command, "-c", str(source)], f"{name}.o", sorted(headers))


def has_kernels(source: pathlib.Path) -> bool:
    """Whether a file of csrc/ops is shared or about an op that has CUDA kernels."""
    return not (CSRC / f"{source.stem}.h").exists() or (CSRC / "cuda" / source.stem).exists()


def assemble(source: pathlib.Path, arch: int) -> pathlib.Path | None:
    """The machine code of a .cu file, which has the same PTX for all; None if it has no kernels."""
    ptx = device.ptx_files(compile_source(PTX, source))
    if not ptx:
        return None
    return compile_once(["ptxas", f"-arch=sm_{arch}", str(ptx[0])], f"{ptx[0].stem}-{arch}.cubin")


@functools.cache
def load() -> Any:
    """torch.ops.fastadapters_simulated; calls are for inside ``device.simulate``."""
    root = pathlib.Path(torch.__file__).parent
    defines = {
        "FASTADAPTERS_CUDA": 1,
        "FASTADAPTERS_SIMULATION": 1,
        "FASTADAPTERS_NAMESPACE": NAMESPACE,
        "TORCH_TARGET_VERSION": "0x020b000000000000",
    }
    command = ["g++", "-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden"]
    command += [f"-D{name}={value}" for name, value in defines.items()]
    command += [f"-I{root / 'include'}"]
    sources = dict.fromkeys(KERNELS, PTX)
    sources |= {s: command for s in sorted((CSRC / "ops").glob("*.cpp")) if has_kernels(s)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda s: compile_source(sources[s], s), sources))
    runtime = ["-cudart", "shared", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    library = compile_once(["nvcc", "-shared", *map(str, objects), *runtime], "cuda.so")
    load.library = ops.define(NAMESPACE, ("CPU",))  # the schemas live as long as this
    device.load_cuda(library, torch_ops=True, objects=objects[: len(KERNELS)])
    return getattr(torch.ops, NAMESPACE)

"""The library's CUDA backend as operators on CPU tensors, run as it ships on the PTX machine."""

from __future__ import annotations

import functools
import pathlib
import subprocess
from typing import Any

import device
import torch
from machine import HERE, build

from fastadapters.ops import bottleneck, multiway

NAMESPACE = "fastadapters_simulated"
CSRC = HERE.parents[1] / "csrc"
KERNELS = CSRC / "cuda" / "bottleneck" / "bottleneck.cu"
ARCHITECTURES = (80, 90)
NVCC = ["nvcc", "-O3", "-std=c++17", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def compile_once(command: list[str], name: str) -> pathlib.Path:
    """Runs a compiler, once for what goes into it; the path of the object or library."""

    def make(target: str) -> None:
        subprocess.run([*command, "-o", target], check=True)

    return build(name, command, [p for p in CSRC.rglob("*.*") if p.is_file()], make)


@functools.cache
def load() -> Any:
    """torch.ops.fastadapters_simulated; calls are for inside ``device.simulate``."""
    root = pathlib.Path(torch.__file__).parent
    codes = [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ARCHITECTURES]
    kernels = compile_once([*NVCC, *codes, "-c", str(KERNELS)], "ptx.o")
    defines = {
        "FASTADAPTERS_CUDA": 1,
        "FASTADAPTERS_SIMULATION": 1,
        "FASTADAPTERS_NAMESPACE": NAMESPACE,
        "TORCH_TARGET_VERSION": "0x020b000000000000",
    }
    command = ["g++", "-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden"]
    command += [f"-D{name}={value}" for name, value in defines.items()]
    command += [f"-I{root / 'include'}", "-c"]
    sources = sorted((CSRC / "ops").glob("*.cpp"))
    ops = [str(compile_once([*command, str(s)], f"ops-{s.stem}.o")) for s in sources]
    runtime = ["-cudart", "shared", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    library = compile_once(["nvcc", "-shared", str(kernels), *ops, *runtime], "cuda.so")
    schemas = bottleneck.define(NAMESPACE)
    multiway.define(schemas, ("CPU",))
    load.library = schemas  # the schemas live as long as this
    device.load_cuda(library, torch_ops=True)
    return getattr(torch.ops, NAMESPACE)

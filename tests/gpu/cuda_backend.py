"""The library's CUDA backend as operators on CPU tensors, run as it ships on the PTX machine."""

from __future__ import annotations

import functools
import hashlib
import pathlib
import subprocess
from typing import Any

import device
import torch
from machine import BUILD, HERE

from fastadapters.ops import bottleneck, multiway

NAMESPACE = "fastadapters_simulated"
CSRC = HERE.parents[1] / "csrc"
ARCHITECTURES = (80, 90)
NVCC = ["nvcc", "-O3", "-std=c++17", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def _compile(command: list[str], suffix: str) -> pathlib.Path:
    """Runs a compiler, once for what goes into it; the path of the object or library."""
    key = hashlib.sha256("\0".join([*command, torch.__version__]).encode())
    for path in sorted(CSRC.rglob("*.*")):
        key.update(path.read_bytes())
    target = BUILD / f"cuda-{key.hexdigest()[:16]}{suffix}"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".new")
        subprocess.run([*command, "-o", str(unfinished)], check=True)
        unfinished.rename(target)
    return target


@functools.cache
def load() -> Any:
    """torch.ops.fastadapters_simulated; calls are for inside ``device.simulate``."""
    root = pathlib.Path(torch.__file__).parent
    codes = [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ARCHITECTURES]
    kernels = _compile([*NVCC, *codes, "-c", str(CSRC / "cuda" / "bottleneck.cu")], ".o")
    defines = {
        "FASTADAPTERS_CUDA": 1,
        "FASTADAPTERS_SIMULATION": 1,
        "FASTADAPTERS_NAMESPACE": NAMESPACE,
        "TORCH_TARGET_VERSION": "0x020b000000000000",
    }
    command = ["g++", "-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden"]
    command += [f"-D{name}={value}" for name, value in defines.items()]
    ops = _compile([*command, f"-I{root / 'include'}", "-c", str(CSRC / "ops.cpp")], ".o")
    runtime = ["-cudart", "shared", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    library = _compile(["nvcc", "-shared", str(kernels), str(ops), *runtime], ".so")
    schemas = bottleneck.define(NAMESPACE)
    multiway.define(schemas, ("CPU",))
    load.library = schemas  # the schemas live as long as this
    device.load_cuda(library, torch_ops=True)
    return getattr(torch.ops, NAMESPACE)

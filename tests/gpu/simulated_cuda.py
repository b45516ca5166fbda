"""Libraries with CUDA kernels in them, whose launches run on the PTX machine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from machine import HERE, Fault, build, compile_shared
from simulation import Simulation

TOOLS = "the CUDA toolkit (nvcc) is not on PATH"


def cuobjdump() -> pathlib.Path:
    """The tool, from the toolkit or from Triton's wheel."""
    found = shutil.which("cuobjdump")
    if found:
        return pathlib.Path(found)
    import triton.backends.nvidia

    return pathlib.Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


_kernels: dict[str, dict[int, str]] = {}  # mangled name -> virtual architecture -> PTX


def ptx_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The PTX in an object or a library, a file for each source and virtual architecture."""

    def make(folder: str) -> None:
        os.makedirs(folder)
        command = [str(cuobjdump()), "-xptx", "all", str(path.resolve())]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    return sorted(build(f"{path.stem}.ptx", [], [path], make).glob("*.ptx"))


def _extract_ptx(path: pathlib.Path) -> None:
    for file in ptx_files(path):
        arch = int(re.search(r"\.sm_(\d+)", file.name).group(1))
        text = file.read_text()
        for name in re.findall(r"\.entry\s+([\w$]+)", text):
            _kernels.setdefault(name, {})[arch] = text


def cuda_kernels(part: str = "") -> list[str]:
    """The mangled names, with `part` in them, of the kernels of the loaded libraries."""
    return [name for name in _kernels if part in name]


def cuda_ptx(name: str, arch: int) -> str:
    """The PTX from which a GPU of this architecture would take the kernel."""
    versions = _kernels[name]
    return versions[max(a for a in versions if a <= arch)]


@functools.cache
def _runtime() -> ctypes.CDLL:
    sources, version = [HERE / "cudart.cpp"], HERE / "cudart.version"
    flags = ["-O1", "-Wl,-soname,libcudart.so.13", f"-Wl,--version-script={version}"]
    return ctypes.CDLL(
        str(compile_shared("cudart", sources, flags, [*sources, version])), ctypes.RTLD_GLOBAL
    )


_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
)
LAUNCH_FAILURE = 719


@contextlib.contextmanager
def cuda_simulated(run: Simulation, processors: int) -> Iterator[None]:
    """Launches of the loaded libraries are the simulation's, on a GPU of so many processors."""
    if not _kernels:
        yield
        return

    def launch(name: bytes, grid: Any, block: Any, shared: int, arguments: Any) -> int:
        try:
            run.launch(
                cuda_ptx(name.decode(), run.arch),
                name.decode(),
                tuple(grid[:3]),
                tuple(block[:3]),
                shared,
                arguments,
            )
        except Fault as fault:
            run.fault = run.fault or fault
            return LAUNCH_FAILURE
        return 0

    callback = _LAUNCH(launch)
    _runtime().simulate(callback, run.arch, processors)
    try:
        yield
    finally:
        _runtime().simulate(None, run.arch, processors)


def load_cuda(
    path: str | pathlib.Path,
    *,
    torch_ops: bool = False,
    objects: Sequence[pathlib.Path] = (),
) -> ctypes.CDLL | None:
    """Loads a library built with `-cudart shared` and PTX inside, to launch from in `simulate`.

    torch_ops: load it with torch.ops.load_library, for a library that registers operators.
    objects: where the PTX is taken from instead. Of a library cuobjdump names it after the sources,
        so that of two with one name a single one is left.
    """
    path = pathlib.Path(path)
    _runtime()
    for file in objects or [path]:
        _extract_ptx(file)
    if torch_ops:
        torch.ops.load_library(str(path))
        return None
    return ctypes.CDLL(str(path))


def cuda_library(
    sources: Sequence[str | pathlib.Path],
    flags: Sequence[str] = (),
    archs: Sequence[str] = ("80", "90a"),
) -> ctypes.CDLL:
    """Compiles .cu files with nvcc to a library (cached by content) and loads it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError(TOOLS)
    paths = [pathlib.Path(s) for s in sources]
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        "-lineinfo",
        "-shared",
        "-Xcompiler",
        "-fPIC",
        "-cudart",
        "shared",
        *flags,
    ]
    for arch in archs:
        command += ["-gencode", f"arch=compute_{arch},code=compute_{arch}"]

    def make(target: str) -> None:
        subprocess.run([*command, *map(str, paths), "-o", target], check=True)

    return load_cuda(build(f"{paths[0].stem}.so", command, paths, make))

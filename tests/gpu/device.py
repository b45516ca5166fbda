"""Run GPU kernels without a GPU: the PTX which nvcc and Triton emit, executed on CPU tensors.

The PTX machine (machine.py, core/*.cpp) checks and counts every access. A fault is an exception,
`Fault`, that names kernel, instruction, source line, block, warp and thread. Ways in:

    import device                            # in tests/gpu; or put that folder on sys.path

    with device.simulate(arch=80, seed=0) as run:     # 80 or 90; the seed draws the schedule
        y = some_host_function(x)                     # kernel[grid](*args, num_warps=4, BLOCK=64)
        y = torch.ops.simulated.forward(x)            # an op of a library loaded by load_cuda
    run.launches                                      # list of Report, one a launch, in order
    run.total()                                       # their sum, one Report
    run.total("forward_kernel")                       # ... of kernels with this in their name

    report = device.triton(kernel, grid, *args, arch=80, seed=0, num_warps=4, BLOCK=64)
    report = device.ptx(text, "name", grid, block, *args, shared=0, seed=0)

    library = device.cuda_library([".../zoo.cu"], flags=["-DX=1"])       # nvcc, then ctypes
    device.load_cuda("build/lib.so", torch_ops=True)  # built with `-cudart shared` and PTX inside

Is each synchronisation needed, and would its loss be seen? `device.mutants(ptx, name)` gives the
kernel with one barrier, fence, commit or wait deleted at a time (`device.cuda_ptx(name, arch)` is
the PTX of a loaded library's kernel); `simulate(..., replace={name: mutant})` runs it in its place.

What a `Report` tells, all exact counts of the launch:

    name, grid, block, shared_bytes
    traffic(tensor)     Traffic of the tensor's storage; traffic() of all memory
        .read .written                      bytes requested (one warp instruction's: distinct bytes)
        .read_sectors .written_sectors      bytes of the 32-byte sectors touched
        .read_unique .written_unique        distinct bytes of the launch
        .read_lines .written_lines          128-byte lines touched by warp instructions
        .partial_read_lines, .partial_written_lines        those of them not wholly used
    instructions        {opcode: warp instructions executed}; count("mma.sync") sums by prefix
    wavefronts, ideal_wavefronts, conflict_ratio           of shared memory: bank conflicts
    conflicts()         [(file, line, instruction, wavefronts, ideal)], worst first

Tensors need no registration: inside `simulate` (in tests/gpu: always) torch's CPU allocator is the
machine's own: it poisons new memory with NaN, leaves gaps round tensors and knows their exact ends.
Tensors made before are known when a Triton launch or `ptx` gets them. Any other pointer is a fault.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from machine import Fault, Report
from simulated_cuda import (
    TOOLS,
    cuda_kernels,
    cuda_library,
    cuda_ptx,
    cuda_simulated,
    cuobjdump,
    load_cuda,
    ptx_files,
)
from simulated_triton import triton_simulated
from simulation import Simulation, arena, ptx, shared_limit

__all__ = [
    "TOOLS", "Fault", "Report", "Simulation", "arena", "cuda_kernels", "cuda_library",
    "cuda_ptx", "cuobjdump", "load_cuda", "mutants", "ptx", "ptx_files", "shared_limit", "simulate",
    "triton",
]  # fmt: skip

MULTIPROCESSORS = 4

_active: Simulation | None = None


@contextlib.contextmanager
def simulate(
    arch: int = 80, seed: int = 0, replace: dict[str, str] | None = None
) -> Iterator[Simulation]:
    """In this block Triton kernels and loaded CUDA libraries run on the machine, as on sm_<arch>.

    replace: PTX to run instead of a kernel's own, by the kernel's (mangled) name.
    """
    global _active
    if _active is not None:
        raise RuntimeError("simulations do not nest")
    _active = run = Simulation(arch, seed, replace or {})
    try:
        with arena(), triton_simulated(run), cuda_simulated(run, MULTIPROCESSORS):
            try:
                yield run
            except Exception as error:
                if run.fault is None or run.fault is error:
                    raise
                raise run.fault from error
        if run.fault is not None:
            raise run.fault
    finally:
        _active = None


def triton(
    kernel: Any, grid: Any, *args: Any, arch: int = 80, seed: int = 0, **meta: Any
) -> Report:
    """Compiles a @triton.jit kernel as its launcher would and runs it: one launch, one report."""
    with simulate(arch, seed) as run:
        kernel[grid](*args, **meta)
    return run.launches[0]


_SYNCHRONISATION = re.compile(
    r"(?:@!?%\w+\s+)?(?:bar(?:rier)?\.(?!arrive)|membar\.|fence\.|cp\.async\.(?:commit|wait)_|wgmma\.(?:fence|commit|wait)_?)[^;\n]*;"
)


def mutants(text: str, name: str) -> Iterator[tuple[str, str]]:
    """(what is missing, PTX): kernel `name` less one synchronising instruction at a time."""
    entry = re.search(rf"[^\n]*\.entry\s+{re.escape(name)}\b.*?\n}}", text, re.DOTALL)
    others = re.compile(r"[^\n]*\.entry\s.*?\n}", re.DOTALL)
    before, after = others.sub("", text[: entry.start()]), others.sub("", text[entry.end() :])
    body = entry.group()
    for found in _SYNCHRONISATION.finditer(body):
        line = re.findall(r"\.loc\s+\d+\s+(\d+)", body[: found.start()])
        where = f"line {line[-1]}: " if line else ""
        yield where + found.group(), before + body[: found.start()] + body[found.end() :] + after

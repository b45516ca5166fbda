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
import ctypes
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from machine import HERE, Fault, Module, Report, build, compile_shared, library

MULTIPROCESSORS = 4
TOOLS = "the CUDA toolkit (nvcc) is not on PATH"


@dataclasses.dataclass
class Simulation:
    """A `simulate` block: architecture, seed, and the reports of the launches so far."""

    arch: int
    seed: int
    replace: dict[str, str] = dataclasses.field(default_factory=dict)
    launches: list[Report] = dataclasses.field(default_factory=list)
    texts: dict[str, str] = dataclasses.field(default_factory=dict)  # PTX last run, by kernel
    fault: Fault | None = (
        None  # of a CUDA launch: raised at the end, whatever its caller made of the error code
    )

    def total(self, name: str = "") -> Report:
        """The sum of the reports of kernels whose name contains `name`."""
        return sum((r for r in self.launches if name in r.name), Report())

    def launch(
        self, text: str, name: str, grid: Any, block: Any, shared: int, arguments: Any
    ) -> None:
        self.texts[name] = self.replace.get(name, text)
        module = _module(self.texts[name])
        seed = self.seed * 1_000_003 + len(self.launches)
        self.launches.append(module.launch(name, grid, block, shared, arguments, seed))


_active: Simulation | None = None
_arena_users = 0


@contextlib.contextmanager
def arena() -> Iterator[None]:
    """torch's CPU allocator is the machine's own in this block: see the top of the file."""
    global _arena_users
    if _arena_users == 0:
        library.arena_install()
    _arena_users += 1
    try:
        yield
    finally:
        _arena_users -= 1
        if _arena_users == 0:
            library.arena_remove()


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
        with arena(), _triton_simulated(), _cuda_simulated(run):
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


@contextlib.contextmanager
def _known(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Tells the machine of tensors that ordinary allocators made."""
    added = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and not library.heap_known(storage.data_ptr()):
            library.heap_add(storage.data_ptr(), storage.nbytes())
            added.append(storage.data_ptr())
    try:
        yield
    finally:
        for address in added:
            library.heap_remove(address)


def _parameters(values: Sequence[bytes]) -> Any:
    buffers = [ctypes.create_string_buffer(v, max(len(v), 8)) for v in values]
    array = (ctypes.c_void_p * len(buffers))(*map(ctypes.addressof, buffers))
    array.buffers = buffers  # kept alive with the array
    return array


@functools.lru_cache(maxsize=256)
def _module(text: str) -> Module:
    return Module(text)


def ptx(
    text: str,
    name: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    *args: torch.Tensor | int | float | bytes,
    shared: int = 0,
    seed: int = 0,
) -> Report:
    """Runs kernel `name` of a PTX module.

    Arguments: tensors (for their pointer), integers, floats (as f32), or the bytes of a struct.
    """
    module = _module(text)
    values = []
    for value, size in zip(args, module.parameters[name], strict=True):
        if isinstance(value, torch.Tensor):
            values.append(struct.pack("<Q", value.data_ptr()))
        elif isinstance(value, float):
            values.append(struct.pack("<f", value))
        else:
            values.append(
                value
                if isinstance(value, bytes)
                else value.to_bytes(size, "little", signed=value < 0)
            )
    with _known([a for a in args if isinstance(a, torch.Tensor)]):
        return module.launch(name, grid, block, shared, _parameters(values), seed)


# ---- Triton


def _flat(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """(kind, value) of what a kernel argument is, a tuple or one value; none of a constant."""
    if isinstance(kind, tuple):
        for each in zip(kind, value, strict=True):
            yield from _flat(*each)
    elif kind != "constexpr":
        yield kind, value


def _pack_triton(kind: str, value: Any) -> bytes:
    if kind.startswith("*"):
        return struct.pack("<Q", 0 if value is None else value.data_ptr())
    if kind in ("fp32", "fp64"):
        return struct.pack("<f" if kind == "fp32" else "<d", value)
    if kind[0] in "iu" and kind[1:].isdigit():
        bits = int(kind[1:])
        return (int(value) & ((1 << bits) - 1)).to_bytes(max(bits // 8, 1), "little")
    raise TypeError(f"a kernel argument of type {kind} is not supported")


def _run_triton(simulation: Simulation, kernel: Any, arguments: dict[str, Any], grid: Any) -> None:
    if callable(grid):
        grid = grid(arguments)
    metadata = kernel.metadata
    if metadata.global_scratch_size or metadata.num_ctas != 1:
        raise NotImplementedError("scratch memory and clusters")
    module = _module(kernel.asm["ptx"])
    flat = [
        pair
        for name, kind in kernel.src.signature.items()
        for pair in _flat(kind, arguments.get(name))
    ]
    values = [_pack_triton(*pair) for pair in flat]
    hidden = len(module.parameters[metadata.name]) - len(
        values
    )  # pointers to scratch memory, unused
    tensors = [value for _, value in flat if isinstance(value, torch.Tensor)]
    limit = shared_limit(simulation.arch)
    if metadata.shared > limit:
        raise Fault(
            "launch",
            f"{metadata.name} needs {metadata.shared} bytes of shared memory of {limit}",
        )
    with _known(tensors):
        block = (metadata.num_warps * 32,)
        simulation.launch(
            kernel.asm["ptx"],
            metadata.name,
            tuple(grid),
            block,
            metadata.shared,
            _parameters([*values, *[bytes(8)] * hidden]),
        )


@contextlib.contextmanager
def _triton_simulated() -> Iterator[None]:
    """Makes kernel[grid](...) compile as on a GPU and run here."""
    try:
        from triton.backends.compiler import GPUTarget
        from triton.backends.driver import DriverBase
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return

    class Driver(DriverBase):
        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", _active.arch, 32)

        def get_current_device(self) -> int:
            return _active.arch  # kernels are cached by device

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_current_stream(self, device: int = 0) -> int:
            return 0

        def get_device_capability(self, *args: int) -> tuple[int, int]:
            return divmod(_active.arch, 10)

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("autotuning")

        def map_python_to_cpp_type(self, kind: str) -> str:
            return kind

    compile_and_launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            own = {k: v for k, v in kwargs.items() if k in self.signature.parameters}
            bound = self.signature.bind(*args, **own)
            bound.apply_defaults()
            _run_triton(_active, kernel, bound.arguments, grid)
        return kernel

    previous = driver._active
    driver.set_active(Driver())
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = compile_and_launch
        driver._active = previous


def triton(
    kernel: Any, grid: Any, *args: Any, arch: int = 80, seed: int = 0, **meta: Any
) -> Report:
    """Compiles a @triton.jit kernel as its launcher would and runs it: one launch, one report."""
    with simulate(arch, seed) as run:
        kernel[grid](*args, **meta)
    return run.launches[0]


# ---- CUDA


def shared_limit(arch: int) -> int:
    """The most shared memory of a block, opted in."""
    if arch == 80:
        return 166_912
    return 101_376 if arch < 90 or arch >= 120 else 232_448


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
def _cuda_simulated(run: Simulation) -> Iterator[None]:
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
    _runtime().simulate(callback, run.arch, MULTIPROCESSORS)
    try:
        yield
    finally:
        _runtime().simulate(None, run.arch, MULTIPROCESSORS)


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

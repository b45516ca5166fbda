"""The PTX machine (core/*.cpp) from Python: build it, load PTX, launch a kernel, read reports."""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

HERE = pathlib.Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "ptx_machine"
INSTRUCTION_LIMIT = 2_000_000_000


class Fault(Exception):
    """What the machine found wrong; `kind` is one word.

    bounds, alignment, uninitialised, race, in-flight, proxy, wgmma, divergence, barrier, deadlock,
    trap, launch, unknown, syntax or limit.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"[{kind}] {message}")
        self.kind = kind


def build(
    name: str, key: Sequence[str], inputs: Iterable[pathlib.Path], make: Callable[[str], None]
) -> pathlib.Path:
    """build/ptx_machine/<name> with a hash in it: what `make(path)` writes.

    Made once for what goes into it (the key's strings, the inputs' contents), by one process.
    """
    digest = hashlib.sha256("\0".join([*key, torch.__version__]).encode())
    for path in sorted(inputs):
        digest.update(path.read_bytes())
    stem, dot, suffix = name.rpartition(".")
    target = BUILD / f"{stem}-{digest.hexdigest()[:16]}{dot}{suffix}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            unfinished = target.with_name(f"new-{target.name}")
            make(str(unfinished))
            unfinished.rename(target)
    return target


def compile_shared(
    name: str, sources: list[pathlib.Path], flags: list[str], inputs: list[pathlib.Path]
) -> pathlib.Path:
    """Compiles C++ sources, side by side, and links them to a library."""
    cpu = [
        line
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("flags")
    ][:1]
    compile_flags = [f for f in flags if not f.startswith(("-l", "-L", "-Wl"))]
    link_flags = [f for f in flags if f.startswith(("-l", "-L", "-Wl"))]

    def make(target: str) -> None:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [f"{folder}/{source.stem}.o" for source in sources]
            command = ["g++", "-std=c++17", "-fPIC", *compile_flags, "-c"]

            def compile_one(source: pathlib.Path, to: str) -> None:
                subprocess.run([*command, str(source), "-o", to], check=True)

            list(pool.map(compile_one, sources, objects))
            subprocess.run(["g++", "-shared", "-o", target, *objects, *link_flags], check=True)

    return build(f"{name}.so", [*flags, *cpu, platform.python_version()], inputs, make)


def _load_library() -> ctypes.CDLL:
    root = pathlib.Path(torch.__file__).parent
    sources = sorted((HERE / "core").glob("*.cpp"), key=lambda p: -p.stat().st_size)
    flags = ["-O2", "-march=native", "-ffp-contract=off", f"-I{root / 'include'}"]
    flags += [
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        f"-L{root / 'lib'}",
        "-lc10",
    ]
    path = compile_shared("machine", sources, flags, [*sources, *(HERE / "core").glob("*.h")])
    library = ctypes.CDLL(str(path))
    library.ptx_load.restype = ctypes.c_void_p
    library.ptx_free.argtypes = [ctypes.c_void_p]
    library.ptx_describe.argtypes = [ctypes.c_void_p]
    library.ptx_describe.restype = ctypes.c_char_p
    library.ptx_compile.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.ptx_compile.restype = ctypes.c_char_p
    library.ptx_launch.restype = ctypes.c_char_p
    library.ptx_launch.argtypes = [
        *(
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_uint32 * 3,
            ctypes.c_uint32 * 3,
            ctypes.c_uint32,
        ),
        *(ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint64, ctypes.c_uint64),
    ]
    library.heap_add.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    library.heap_remove.argtypes = [ctypes.c_uint64]
    library.heap_known.argtypes = [ctypes.c_uint64]
    return library


library = _load_library()


@dataclasses.dataclass
class Traffic:
    """Bytes (lines: numbers) that warp instructions moved between the cores and global memory."""

    read: int = 0
    written: int = 0
    read_sectors: int = 0
    written_sectors: int = 0
    read_unique: int = 0
    written_unique: int = 0
    read_lines: int = 0
    written_lines: int = 0
    partial_read_lines: int = 0
    partial_written_lines: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            *(
                a + b
                for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
            )
        )


@dataclasses.dataclass
class Report:
    """The counts of a launch, or of several added up; see device.py."""

    name: str = ""
    grid: tuple[int, ...] = ()
    block: tuple[int, ...] = ()
    shared_bytes: int = 0
    instructions: dict[str, int] = dataclasses.field(default_factory=dict)
    wavefronts: int = 0
    ideal_wavefronts: int = 0
    by_address: dict[int, Traffic] = dataclasses.field(default_factory=dict)
    conflict_list: list[tuple[str, int, str, int, int]] = dataclasses.field(default_factory=list)

    def traffic(self, tensor: torch.Tensor | None = None) -> Traffic:
        """The traffic of the tensor's storage, or of all memory."""
        if tensor is None:
            return sum(self.by_address.values(), Traffic())
        return self.by_address.get(tensor.untyped_storage().data_ptr(), Traffic())

    def count(self, prefix: str) -> int:
        """Warp instructions executed whose opcode starts with `prefix`."""
        return sum(n for opcode, n in self.instructions.items() if opcode.startswith(prefix))

    @property
    def conflict_ratio(self) -> float:
        """Shared-memory wavefronts over those without bank conflicts."""
        return self.wavefronts / self.ideal_wavefronts if self.ideal_wavefronts else 1.0

    def conflicts(self) -> list[tuple[str, int, str, int, int]]:
        """(file, line, instruction, wavefronts, ideal) where banks conflict, worst first."""
        return sorted(self.conflict_list, key=lambda c: c[4] - c[3])

    def __add__(self, other: Report) -> Report:
        instructions = dict(self.instructions)
        for opcode, n in other.instructions.items():
            instructions[opcode] = instructions.get(opcode, 0) + n
        by_address = dict(self.by_address)
        for address, traffic in other.by_address.items():
            by_address[address] = by_address.get(address, Traffic()) + traffic
        return Report(
            name=f"{self.name}+{other.name}" if self.name else other.name,
            grid=other.grid,
            block=other.block,
            shared_bytes=max(self.shared_bytes, other.shared_bytes),
            instructions=instructions,
            wavefronts=self.wavefronts + other.wavefronts,
            ideal_wavefronts=self.ideal_wavefronts + other.ideal_wavefronts,
            by_address=by_address,
            conflict_list=self.conflict_list + other.conflict_list,
        )


class Module:
    """A PTX module. `parameters[kernel]` holds the sizes in bytes of each kernel's parameters."""

    def __init__(self, ptx: str) -> None:
        error = ctypes.c_char_p()
        self._handle = library.ptx_load(ptx.encode(), ctypes.byref(error))
        if not self._handle:
            raise Fault("syntax", (error.value or b"").decode())
        lines = library.ptx_describe(self._handle).decode().splitlines()
        self.parameters = {
            name: [int(n) for n in sizes.split(",") if n]
            for name, sizes in (line.rsplit(":", 1) for line in lines)
        }

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            library.ptx_free(self._handle)

    def compile(self, name: str) -> None:
        """Checks that every instruction of a kernel is known."""
        problem = library.ptx_compile(self._handle, name.encode()).decode()
        if problem:
            raise Fault("unknown", problem)

    def launch(
        self,
        name: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        shared: int,
        arguments: ctypes.Array,
        seed: int = 0,
    ) -> Report:
        """Runs one kernel; `arguments` is a C array of pointers to them, as for cuLaunchKernel."""
        sizes = [(ctypes.c_uint32 * 3)(*(*dims, 1, 1)[:3]) for dims in (grid, block)]
        answer = library.ptx_launch(
            self._handle, name.encode(), *sizes, shared, arguments, seed, INSTRUCTION_LIMIT
        )
        result = json.loads(answer)
        if "fault" in result:
            raise Fault(result["fault"], result["message"])
        return Report(
            name=name,
            grid=tuple(sizes[0]),
            block=tuple(sizes[1]),
            shared_bytes=shared,
            instructions=result["instructions"],
            wavefronts=result["wavefronts"],
            ideal_wavefronts=result["ideal_wavefronts"],
            by_address={base: Traffic(*counts) for base, _, *counts in result["traffic"]},
            conflict_list=[tuple(c) for c in result["conflicts"]],
        )

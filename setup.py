"""Builds csrc/ into one library, fastadapters/_C.abi3.so, on PyTorch's stable ABI.

`plan` decides what to build from plain values; what follows it looks at the machine and runs the
compilers. Metadata is in pyproject.toml, the sources are in csrc/sources.txt, the options in
docs/building.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

BUILDS = ("auto", "pure", "cpu", "cuda")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
OLDEST_TORCH = (2, 11)
OLDEST_NVCC = (12, 8)
OLDEST_SETUPTOOLS = 77

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)

# TORCH_TARGET_VERSION keeps the library loadable by every PyTorch from OLDEST_TORCH on.
CXX_FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)
NVCC_FLAGS = ("-O3", "-std=c++17", "-Xfatbin=-compress-all", "-Xcompiler=-fPIC,-fvisibility=hidden")
# Nothing refers to libtorch.so, but in a CUDA build of PyTorch it brings in the CUDA part.
TORCH_LIBRARIES = ("-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu", "-lc10")
CUDA_LIBRARIES = ("-lcudart_static", "-lrt", "-ldl", "-lpthread")


class Torch(NamedTuple):
    version: str
    cuda: str | None
    root: Path


class Nvcc(NamedTuple):
    path: str
    version: tuple[int, int]
    architectures: tuple[int, ...]
    library_flags: tuple[str, ...]


class Tools(NamedTuple):
    """What this machine has to build with; None for what it has not."""

    torch: Torch | None
    compiler: str | None
    nvcc: Nvcc | None
    gpus: str = ""
    """the architectures of its GPUs, in the form of TORCH_CUDA_ARCH_LIST"""


class Plan(NamedTuple):
    """What to build: `pure` (Python only), `cpu` or `cuda`; in a line each, what was left out."""

    build: str
    jobs: int
    gencode: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def gencode(requested: str, known: Collection[int]) -> tuple[tuple[str, ...], list[str]]:
    """nvcc's flags for a list like "8.0;9.0a 12.0+PTX", and the entries that are not supported."""
    flags, skipped = [], []
    for entry in re.findall(r"[^;,\s]+", requested):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 12.0+PTX, got {entry!r}"
            )
        number = int(match[1] + match[2])
        if number < ARCHITECTURES[0] or number not in known:
            skipped.append(entry)
            continue
        # The kernels use nothing newer: their PTX is made once, and runs on whatever comes.
        name = f"{number}{match[3]}"
        virtual = name if match[3] else ARCHITECTURES[0]
        flags.append(f"-gencode=arch=compute_{virtual},code=sm_{name}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{virtual},code=compute_{virtual}")
    return tuple(flags), skipped


def plan(env: Mapping[str, str], tools: Tools, *, system: str, cuda_sources: bool) -> Plan:
    """Decide what to build; ValueError if what FASTADAPTERS_BUILD asks for by name cannot be built.

    No GPU is needed for `cuda`, nor a CUDA build of PyTorch: no .cu file includes a PyTorch header.
    """
    torch, compiler, nvcc, gpus = tools
    wanted = env.get("FASTADAPTERS_BUILD") or "auto"
    if wanted not in BUILDS:
        raise ValueError(f"FASTADAPTERS_BUILD: expected one of {', '.join(BUILDS)}, got {wanted!r}")
    max_jobs = env.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not re.fullmatch(r"[1-9]\d*", max_jobs):
        raise ValueError(f"MAX_JOBS: expected a positive number, got {max_jobs!r}")
    jobs = int(max_jobs)
    if wanted == "pure":
        return Plan("pure", jobs)

    missing = None
    if system != "Linux":
        missing = f"they are built on Linux, not on {system}"
    elif torch is None:
        missing = "PyTorch is not installed where the build runs (pip: --no-build-isolation)"
    elif tuple(map(int, re.findall(r"\d+", torch.version)[:2])) < OLDEST_TORCH:
        missing = f"PyTorch {torch.version} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    elif compiler is None:
        missing = "no C++ compiler was found (GCC 11 or Clang 12 at least; CXX names one)"
    if missing is not None:
        if wanted != "auto":
            raise ValueError(f"FASTADAPTERS_BUILD={wanted}: {missing}")
        return Plan("pure", jobs, notes=(f"built without the compiled kernels: {missing}",))
    if wanted == "cpu":
        return Plan("cpu", jobs)

    flags: tuple[str, ...] = ()
    skipped: list[str] = []
    if not cuda_sources:
        missing = "csrc/sources.txt lists no .cu file"
    elif nvcc is None:
        missing = "no working nvcc was found (CUDA_HOME names a toolkit)"
    elif nvcc.version < OLDEST_NVCC:
        found, oldest = (".".join(map(str, v)) for v in (nvcc.version, OLDEST_NVCC))
        missing = f"nvcc {found} is older than {oldest}"
    else:
        default = ";".join(f"{a / 10}" for a in ARCHITECTURES if a in nvcc.architectures)
        requested = env.get("TORCH_CUDA_ARCH_LIST") or gpus or f"{default}+PTX" * bool(default)
        flags, skipped = gencode(requested, nvcc.architectures)
        if not flags:
            missing = f"nvcc supports nothing in {requested or ARCHITECTURES}"
    if missing is not None:
        if wanted == "cuda":
            raise ValueError(f"FASTADAPTERS_BUILD=cuda: {missing}")
        # With neither a toolkit nor a PyTorch that could use CUDA, nobody misses it.
        matters = cuda_sources and (nvcc is not None or (torch is not None and torch.cuda))
        return Plan("cpu", jobs, notes=(f"built without CUDA: {missing}",) if matters else ())
    left_out = f"TORCH_CUDA_ARCH_LIST: left out {', '.join(skipped)}, not supported"
    return Plan("cuda", jobs, flags, (left_out,) if skipped else ())


def read_sources() -> dict[Path, list[str]]:
    """The sources, each with flags of its own: those are for x86-64, and so is the source."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    sources = {}
    for line in (CSRC / "sources.txt").read_text().splitlines():
        name, *flags = line.partition("#")[0].split() or [""]
        if name and (x86 or not flags):
            sources[CSRC / name] = flags
    return sources


def find_torch() -> Torch | None:
    """The installed PyTorch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    facts = runpy.run_path(str(root / "version.py"))
    return Torch(facts["__version__"], facts["cuda"], root)


def run(*command: str) -> str | None:
    """What a command prints, stderr included; None if it fails or doesn't exist."""
    try:
        return subprocess.run(
            command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def find_compiler(flags: Sequence[str]) -> str | None:
    """The first C++ compiler that has a standard library and takes all of ``flags``."""
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        probe = (*shlex.split(name), *flags, "-include", "cmath", "-fsyntax-only", "-xc++")
        if run(*probe, os.devnull) is not None:
            return name
    return None


def find_nvcc(compiler: str | None) -> Nvcc | None:
    """The nvcc to use, if it works with ``compiler``.

    It may be a wrapper script far from its toolkit, so it is asked where its libraries are.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if compiler is None:
        return None
    version = re.search(r"release (\d+)\.(\d+)", run(path, "--version") or "")
    known = run(path, "--list-gpu-arch")
    host = shlex.split(compiler)[-1]
    trial = run(path, "-ccbin", host, "-v", "-E", "-x", "cu", os.devnull, "-o", os.devnull)
    libraries = re.search(r"LIBRARIES=(.*)", trial or "")
    if version is None or known is None or libraries is None:
        return None
    return Nvcc(
        path,
        (int(version[1]), int(version[2])),
        tuple(map(int, re.findall(r"compute_(\d+)", known))),
        tuple(shlex.split(libraries[1])),
    )


def included(source: Path) -> set[Path]:
    """The source and the headers of this project that it includes, directly or not."""
    found, new = set(), {source.resolve()}
    while new:
        found |= new
        paths = (path.parent / name for path in new for name in _INCLUDE.findall(path.read_text()))
        new = {path.resolve() for path in paths if path.exists()} - found
    return found


def commands(
    made: Plan, tools: Tools, sources: Mapping[Path, Sequence[str]]
) -> tuple[dict[Path, list[str]], list[str], list[str]]:
    """What compiles each source (lacking `-o`), what links, and the libraries to link with."""
    if tools.torch is None or tools.compiler is None:
        raise ValueError("tools: a pure build compiles nothing")
    cxx = shlex.split(tools.compiler)
    compilers = {".cpp": [*cxx, *CXX_FLAGS, "-isystem", str(tools.torch.root / "include")]}
    libraries = [f"-L{tools.torch.root / 'lib'}", *TORCH_LIBRARIES]
    if made.build == "cuda" and tools.nvcc is not None:
        nvcc = [tools.nvcc.path, f"-ccbin={cxx[-1]}", *NVCC_FLAGS, *made.gencode]
        compilers[".cpp"].append("-DFASTADAPTERS_CUDA")
        compilers[".cu"] = [*nvcc, f"--threads={made.jobs}"]
        libraries += [*tools.nvcc.library_flags, *CUDA_LIBRARIES]
    compiles = {
        source: [*compilers[source.suffix], *flags, "-c", str(source)]
        for source, flags in sources.items()
        if source.suffix in compilers
    }
    return compiles, [*cxx, "-shared", "-s"], libraries


def describe(made: Plan, sources: int) -> str:
    """What is about to be compiled, how long it takes, and how to choose."""
    if made.build == "cpu":
        return f"compiling {sources} files of CPU kernels, {made.jobs} at a time: a minute or two"
    names = " ".join(flag.rpartition("=")[2] for flag in made.gencode)
    return (
        f"compiling {sources} files, {made.jobs} at a time, the CUDA ones for {names}: some minutes"
        " for each architecture and core. TORCH_CUDA_ARCH_LIST chooses the architectures,"
        " FASTADAPTERS_BUILD=cpu leaves CUDA out"
    )


class BuildLibrary(build_ext):
    """Compiles each source with its own flags, MAX_JOBS at a time, and links _C.abi3.so."""

    made: Plan
    tools: Tools

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', os.sep)}.abi3.so"

    def build_extension(self, ext: Extension) -> None:
        compiles, link, libraries = commands(self.made, self.tools, read_sources())
        print(describe(self.made, len(compiles)), flush=True)

        def compile_object(source: Path) -> str:
            # Named after all that goes into it, so that a rebuild compiles only what has changed.
            command = shlex.join(compiles[source]).replace(str(ROOT), "")
            texts = [path.read_bytes() for path in sorted(included(source))]
            digest = hashlib.sha256(b"".join([command.encode(), *texts])).hexdigest()[:16]
            name = "-".join(source.relative_to(CSRC).with_suffix("").parts)
            target = ROOT / "build" / "objects" / f"{name}-{digest}.o"
            if not target.exists():
                print(shlex.join(compiles[source]), flush=True)
                target.parent.mkdir(parents=True, exist_ok=True)
                unfinished = target.with_suffix(f".{os.getpid()}.o")
                subprocess.run([*compiles[source], "-o", str(unfinished)], check=True)
                unfinished.rename(target)
            return str(target)

        with ThreadPoolExecutor(self.made.jobs) as pool:
            objects = list(pool.map(compile_object, compiles))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*link, "-o", str(library), *objects, *libraries], check=True)


class BuildPython(build_py):
    """Also writes _build.json: what was built, for `python -m fastadapters.info`."""

    made: Plan
    tools: Tools

    def run(self) -> None:
        super().run()
        package = ROOT / "fastadapters"
        if not self.editable_mode:
            package = Path(self.build_lib, "fastadapters")
        else:
            show_to_type_checkers(Path(self.get_finalized_command("install").install_lib))
            if self.made.build == "pure":
                (package / "_C.abi3.so").unlink(missing_ok=True)
        (package / "_build.json").write_text(json.dumps(facts(self.made, self.tools), indent=2))
        for note in self.made.notes:
            warnings.warn(note, stacklevel=1)  # the one way of speaking that pip passes on


def show_to_type_checkers(site_packages: Path) -> None:
    """Put a folder that holds the package alone on the path of an editable installation.

    setuptools' own way is a hook of the import, for kernels/ lies outside of the package; type
    checkers run none.
    """
    folder = ROOT / "build" / "editable"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "fastadapters"
    with contextlib.suppress(OSError):  # Windows may refuse
        link.symlink_to(ROOT / "fastadapters", target_is_directory=True)
    (site_packages / "fastadapters.pth").write_text(f"{folder}\n")


def facts(made: Plan, tools: Tools) -> dict[str, object]:
    torch, compiler, nvcc, _ = tools
    built: dict[str, object] = {"build": made.build, "notes": made.notes}
    if made.build != "pure" and torch and compiler:
        version = run(*shlex.split(compiler), "--version") or compiler
        built |= {"torch": torch.version, "compiler": version.splitlines()[0]}
    if made.build == "cuda" and nvcc:
        built["nvcc"] = ".".join(map(str, nvcc.version))
        built["architectures"] = [flag.rpartition("=")[2] for flag in made.gencode]
    return built


def gpu_architectures() -> str:
    """Those of the GPUs of this machine, in the form of TORCH_CUDA_ARCH_LIST."""
    found = run("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader") or ""
    return ";".join(sorted({line for line in found.split() if re.fullmatch(r"\d+\.\d", line)}))


def main() -> None:
    if tuple(map(int, re.findall(r"\d+", setuptools.__version__)[:1])) < (OLDEST_SETUPTOOLS,):
        sys.exit(
            f"error: setuptools {setuptools.__version__} is older than {OLDEST_SETUPTOOLS}:"
            " pip install --upgrade setuptools"
        )
    sources = read_sources()
    cuda_sources = any(source.suffix == ".cu" for source in sources)
    compiler = find_compiler([*CXX_FLAGS, *itertools.chain(*sources.values())])
    nvcc = find_nvcc(compiler) if cuda_sources else None
    tools = Tools(find_torch(), compiler, nvcc, gpu_architectures() if nvcc else "")
    try:
        made = plan(os.environ, tools, system=platform.system(), cuda_sources=cuda_sources)
    except ValueError as error:
        sys.exit(f"error: {error}")
    BuildLibrary.made = BuildPython.made = made
    BuildLibrary.tools = BuildPython.tools = tools
    library = Extension("fastadapters._C", [], py_limited_api=True)
    setup(
        cmdclass={"build_ext": BuildLibrary, "build_py": BuildPython},
        ext_modules=[] if made.build == "pure" else [library],
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()

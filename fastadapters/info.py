"""``python -m fastadapters.info``: what is installed, what can run, what runs, and why."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from . import __version__, backends

# Variables that change what runs or how fast, beside all FASTADAPTERS_*.
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TRITON_INTERPRET")


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    if torch.version.cuda is None:
        return f"none, this PyTorch was built for {'ROCm' if torch.version.hip else 'CPUs'}"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, no device"
    devices = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return f"{torch.version.cuda}, {torch.cuda.device_count()} x {', '.join(sorted(devices))}"


def cpu_name() -> str:
    """As the system has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _copies() -> Iterator[tuple[str, str]]:
    """Where the package that runs lies, and that another one is installed, if it is."""
    here = Path(__file__).parent
    yield "package", str(here)
    try:
        installed = importlib.metadata.distribution("fastadapters")
    except importlib.metadata.PackageNotFoundError:
        return
    paths = [file for file in installed.files or () if file.match("fastadapters/info.py")]
    for path in paths:  # none where it is an editable installation
        other = Path(str(installed.locate_file(path))).resolve().parent
        if other != here.resolve():
            yield "note", f"another copy is installed in {other}: run this in another folder"


def _library() -> Iterator[tuple[str, str]]:
    yield "path", backends.library_error or str(backends.LIBRARY)
    record = backends.LIBRARY.with_name("_build.json")
    if record.exists():
        built = json.loads(record.read_text())
        notes = built.pop("notes")
        for key, value in built.items():
            yield key, value if isinstance(value, str) else " ".join(value)
        for note in notes:
            yield "note", note
    if backends.library_error is None:
        for dtype, isa in backends.CPU_ISAS.items():
            yield f"cpu isa, {str(dtype).removeprefix('torch.')}", isa
        library = ctypes.CDLL(str(backends.LIBRARY))
        library.fastadapters_cpu_isas.restype = ctypes.c_char_p
        yield "cpu isas here", library.fastadapters_cpu_isas().decode().replace(",", " ")


def _backends() -> Iterator[tuple[str, str]]:
    for name, problem in backends.status().items():
        yield name, problem or "available"


def _ops() -> Iterator[tuple[str, str]]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for op, kernels in backends.KERNELS.items():
        for device in devices:
            x = torch.empty(0, device=device)
            with backends.backend("auto"):
                (decision,) = backends.explain(backends.resolve, op, x)
            if decision.backend not in kernels:
                yield f"{op} on {device}", f"{decision.backend}: {decision.reason}"
                continue
            for dtype in backends.FUSED_DTYPES:
                most = backends.limit(op, x.device, dtype)
                sizes = (
                    "always"
                    if most is None
                    else f"up to r = {most.width} and D * r = {most.weight}, then eager"
                    f" ({backends.architecture(x.device, dtype)}; {most.source})"
                )
                yield (
                    f"{op} on {device}, {str(dtype).removeprefix('torch.')}",
                    f"{decision.backend} {sizes}",
                )


def _environment() -> Iterator[tuple[str, str]]:
    for name, value in sorted(os.environ.items()):
        if name.startswith("FASTADAPTERS_") or name in _VARIABLES:
            yield name, value


def report() -> str:
    """The whole report, one fact a line."""
    versions = (
        ("fastadapters", __version__),
        ("python", platform.python_version()),
        ("cpu", f"{cpu_name()}, {os.cpu_count()} cores"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("triton", _triton()),
        ("cuda", _cuda()),
    )
    sections: dict[str, Iterable[tuple[str, str]]] = {
        "versions": (*versions, *_copies()),
        "library": _library(),
        "backends": _backends(),
        "what auto runs": _ops(),
        "environment": _environment(),
    }
    lines = []
    for title, rows in sections.items():
        lines += ["", title, *(f"  {key:<32} {value}" for key, value in rows)]
    return "\n".join(lines[1:])


if __name__ == "__main__":
    print(report())

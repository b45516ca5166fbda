"""Which backends exist here, which one runs an op, and why.

`reference` and `eager` are plain PyTorch and always available. `cpu` (C++) and `cuda` (C++/CUDA)
live in the compiled library, `triton` in `fastadapters.kernels`. Nothing here touches CUDA or
Triton until a CUDA tensor or a user asks.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, ParamSpec, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from ._ops import add_op_namespace_prefix
from .checks import check_choice
from .crossover import LIMITS, Limit
from .cuda_limits import (
    attention_refusal,
    cuda_fits,
    fusion_refusal,
    grouped_refusal,
    head_refusal,
)
from .options import BackendName

_P = ParamSpec("_P")

NAMES: tuple[str, ...] = get_args(BackendName)

# The backends with a kernel for each op, fastest first.
KERNELS: dict[str, tuple[str, ...]] = {
    "bottleneck": ("cpu", "cuda", "triton"),
    "cross_modal_attention": ("cpu", "cuda", "triton"),
    "multimodal": ("cpu", "cuda", "triton"),
    "sequence_fusion": ("cpu", "cuda", "triton"),
}

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEVICE = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}

# What the kernels may be given: tensors that are nothing else, what stands for such while PyTorch
# traces, and what is no tensor.
PLAIN_TYPES = frozenset(
    (Tensor, nn.Parameter, FakeTensor, FunctionalTensor, type(None), float, int)
)

# Beside this file lies one library at most, named by who built it.
_HERE = Path(__file__).parent
LIBRARY = next(_HERE.glob("*.abi3.so"), _HERE / "_C.abi3.so")


class Decision(NamedTuple):
    """One dispatch: the op, the backend that ran it, and why.

    Backend ``layers`` is a module's own layers, called one by one.
    """

    op: str
    backend: str
    reason: str


def _whole(library: Path) -> bool:
    """Whether a 64-bit ELF file goes on to its end, where the table of sections is.

    What is cut short, by a full disk say, kills the process that loads it.
    """
    header = library.read_bytes()[:64]
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return False
    table, entry, count = struct.unpack("<40xQ10xHH2x", header)
    return bool(library.stat().st_size >= table + entry * count)


def _load_library() -> str | None:
    """Load the compiled kernels; None, or why there are none."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} was not built (see docs/building.md)"
    if not _whole(LIBRARY):
        return f"{LIBRARY.name} is damaged: install the package again"
    try:
        torch.ops.load_library(LIBRARY)
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY.name} did not load: {error.__cause__ or error}"
    if not hasattr(ctypes.CDLL(str(LIBRARY)), "fastadapters_cpu_isa_for"):
        return f"{LIBRARY.name} has none of the ops: install the package again"
    return None


library_error = _load_library()
_selected = os.environ.get("FASTADAPTERS_BACKEND") or "auto"
_log: list[Decision] | None = None


def has_kernel(op: str, key: str) -> bool:
    """Whether the compiled library implements ``op`` for dispatch key ``key`` (CPU, CUDA)."""
    return library_error is None and torch._C._dispatch_has_kernel_for_dispatch_key(
        add_op_namespace_prefix(op), key
    )


def _cpu_isas() -> dict[torch.dtype, str]:
    """For each dtype, the instruction set of the CPU kernels and why: "avx2: the best ..."."""
    if library_error is not None:
        return {}
    library = ctypes.CDLL(str(LIBRARY))
    library.fastadapters_cpu_isa_for.restype = ctypes.c_char_p
    return {
        dtype: library.fastadapters_cpu_isa_for(code).decode()
        for code, dtype in enumerate(FUSED_DTYPES)
    }


CPU_ISAS = _cpu_isas()


def architecture(device: torch.device, dtype: torch.dtype) -> str:
    """The instruction set or the architecture that decides, such as avx2 or sm_90."""
    if device.type == "cpu":
        return CPU_ISAS[dtype].partition(":")[0]
    if torch.version.hip:
        return "amd"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def limit(op: str, device: torch.device, dtype: torch.dtype) -> Limit | None:
    """Up to which sizes the kernels beat `eager`; None where they always do."""
    found = LIMITS.get((op, device.type, architecture(device, dtype), dtype))
    return LIMITS.get((op, device.type, "other", dtype)) if found is None else found


def unavailable(name: str) -> str | None:
    """Why backend ``name`` cannot run on this machine; None when it can."""
    if name in ("auto", "reference", "eager"):
        return None
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
    elif library_error is not None:
        return library_error
    if name == "cuda" and not has_kernel("bottleneck_forward_out", "CUDA"):
        return "the library was built without CUDA"
    if _DEVICE[name] == "cuda" and not torch.cuda.is_available():
        return "there is no GPU (or this PyTorch was built without one)"
    if name == "cuda" and (torch.version.hip or torch.cuda.get_device_capability() < (8, 0)):
        return "it needs an NVIDIA GPU of compute capability 8.0 or newer"
    return None


def status() -> dict[str, str | None]:
    """Every backend, with None when it can run here or else the reason why not."""
    return {name: unavailable(name) for name in NAMES if name != "auto"}


class Problem(NamedTuple):
    """What the choice of a backend depends on beside ``x``, for the ops that have kernels."""

    d: int
    r: int
    compute: torch.dtype
    out: torch.dtype
    others: tuple[object, ...] = ()
    """the other arguments, tensors among them"""
    refusal: str | None = None
    """why no kernel takes these arguments"""
    sizes: tuple[int, ...] = ()
    """those that the op's CUDA kernels have limits for, see cuda_limits"""
    adapters: int = 0
    """how many are stacked, where each row has one of its own"""
    entries: int = 0
    """of the index that says which"""


def _all_plain(x: Tensor, problem: Problem) -> bool:
    """Whether no argument is of a subclass: sharded, nested, quantized ..."""
    return type(x) in PLAIN_TYPES and PLAIN_TYPES.issuperset(map(type, problem.others))


def transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work, which need plain PyTorch."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _why_not(name: str, op: str, x: Tensor, problem: Problem | None) -> str | None:
    """Why fused backend ``name`` cannot run ``op`` on ``x``."""
    if name not in KERNELS[op]:
        return f"it has no kernel for {op}"
    if x.device.type != _DEVICE[name]:
        return f"it runs on {_DEVICE[name]} tensors, not on {x.device.type}"
    for dtype in (x.dtype,) if problem is None else (x.dtype, problem.compute, problem.out):
        if dtype not in FUSED_DTYPES:
            return f"it takes float32, bfloat16 and float16, not {dtype}"
    if problem is not None and problem.refusal is not None:
        return problem.refusal
    if problem is not None and not _all_plain(x, problem):
        return "it reads plain tensors, not a subclass"
    if transformed():
        return "torch.func and forward-mode differentiation need plain PyTorch"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records plain PyTorch"
    missing = unavailable(name)
    if missing is None and problem is not None and problem.adapters and name != "cpu":
        missing = grouped_refusal(problem.adapters, problem.entries, max(problem.d, problem.r))
    if missing is None and name == "cuda" and problem is not None:
        return _too_large(op, x, problem, torch.cuda.get_device_capability(x.device))
    return missing


def _too_large(op: str, x: Tensor, problem: Problem, capability: tuple[int, int]) -> str | None:
    """Why the CUDA kernels of ``op`` do not take these sizes on such a GPU."""
    if op == "bottleneck":
        dtypes = (problem.compute, x.dtype, problem.out)
        if not cuda_fits(problem.r, *dtypes, capability):
            return f"r = {problem.r} is too large for the shared memory of this GPU"
    elif op == "cross_modal_attention":
        return attention_refusal(problem.r)
    elif op == "multimodal":
        return head_refusal(problem.sizes, capability)
    elif op == "sequence_fusion":
        return fusion_refusal(problem.sizes)
    return None


def _why_slower(op: str, x: Tensor, problem: Problem | None) -> str | None:
    """Why `eager` is faster than a kernel that can run."""
    if problem is None or (problem.adapters > 1 and x.device.type == "cuda"):
        return None  # there plain PyTorch multiplies so many times as much
    most = limit(op, x.device, problem.compute)
    return None if most is None else most.exceeded(problem.d, problem.r)


_warned = False


def _warn_once(op: str, x: Tensor) -> None:
    """Say, once, that plain PyTorch runs what the compiled library would have run faster."""
    global _warned
    served = "cpu" in KERNELS[op] and x.device.type == "cpu" and x.dtype in FUSED_DTYPES
    if served and not _warned and sys.platform == "linux" and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            f"fastadapters runs {op} in plain PyTorch, slower than its kernels: {library_error}."
            " They are compiled by `pip install --no-build-isolation --force-reinstall --no-deps"
            " fastadapters` in an environment that has PyTorch and a C++ compiler",
            stacklevel=2,
        )


def chosen_by_name() -> bool:
    """Whether the user named a backend, whose definition then holds to the mask of dropout."""
    return _selected != "auto"


def resolve(op: str, x: Tensor, problem: Problem | None = None) -> str:
    """The backend that runs ``op`` on ``x``; RuntimeError if one chosen by name cannot."""
    name = _selected
    if name == "auto":
        reason = "fastest available"
        for name in (*KERNELS[op], "eager"):
            if name == "eager":
                break
            why = _why_not(name, op, x, problem) or _why_slower(op, x, problem)
            if why is None:
                break
            reason += f"; not {name}: {why}"
        if name == "eager" and library_error is not None and problem is not None:
            _warn_once(op, x)
        if name == "eager" and problem is not None and not _all_plain(x, problem):
            name = "reference"  # each operation as published: what subclasses are known to take
    else:
        check_choice("FASTADAPTERS_BACKEND", name, NAMES)
        why = None if name in ("reference", "eager") else _why_not(name, op, x, problem)
        if why is not None:
            raise RuntimeError(f"backend {name!r} cannot run {op}: {why}")
        reason = "chosen by name"
    if _log is not None:
        _log.append(Decision(op, name, reason))
    return name


def call_layers(op: str, reason: str) -> None:
    """Log that a module calls its layers instead of ``op``; RuntimeError if a backend was chosen.

    `reference` and `eager` are plain PyTorch, and so are the layers.
    """
    if _selected not in ("auto", "reference", "eager"):
        raise RuntimeError(f"backend {_selected!r} cannot run {op}: {reason}")
    if _log is not None:
        _log.append(Decision(op, "layers", reason))


@contextlib.contextmanager
def backend(name: BackendName) -> Iterator[None]:
    """Run the ops in this block on backend ``name``: auto, reference, eager, cpu, triton or cuda.

    ``auto`` (the default; the environment variable FASTADAPTERS_BACKEND changes it) takes the
    fastest that can run and falls back silently; any other that cannot run raises RuntimeError
    when an op is called. The choice is process-wide, like the flags of ``torch.backends``.
    Raises ValueError for an unknown name.

    Examples:
        >>> import fastadapters
        >>> adapter = fastadapters.BottleneckAdapter(768, 64)
        >>> with fastadapters.backend("reference"):
        ...     y = adapter(torch.randn(4, 768))
    """
    global _selected
    check_choice("name", name, NAMES)
    previous, _selected = _selected, name
    try:
        yield
    finally:
        _selected = previous


def explain(fn: Callable[_P, object], *args: _P.args, **kwargs: _P.kwargs) -> list[Decision]:
    """Call ``fn(*args, **kwargs)`` and return the dispatch decisions it made, in order.

    Examples:
        >>> import fastadapters
        >>> adapter = fastadapters.BottleneckAdapter(768, 64)
        >>> with fastadapters.backend("eager"):
        ...     fastadapters.explain(adapter, torch.randn(4, 768))
        [Decision(op='bottleneck', backend='eager', reason='chosen by name')]
    """
    global _log
    if not callable(fn):
        raise TypeError(f"fn: expected a callable, got {type(fn).__name__}")
    log: list[Decision] = []
    previous, _log = _log, log
    try:
        fn(*args, **kwargs)
    finally:
        _log = previous
        if previous is not None:
            previous += log
    return log

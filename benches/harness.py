"""How everything here is measured: one record, one clock, all candidates taking turns.

A case holds callables over the same tensors. They run in rounds, one call each, in an order drawn
anew each time, so that a busy neighbour, what the one before left in the caches, or a boosting
clock meets all alike; what is compared is the median of each. The roof, a plain copy and a plain
GEMM, takes its turns too.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastadapters
from tests.compare import check_all, last_bit

from .noise import is_settled, ratios
from .workloads import Cost

Outputs = Tensor | tuple[Tensor, ...]
Candidate = Callable[[], object]
COMPILE_MODES = {"compiled": None, "max-autotune": "max-autotune-no-cudagraphs"}


class Case(NamedTuple):
    """One op on one workload. Every callable takes ``inputs`` by name."""

    op: str
    workload: str
    inputs: dict[str, Tensor]
    """in the dtype measured; those that want a gradient say so"""
    candidates: dict[str, Callable[..., Outputs]]
    """ours, reference (as published) and eager"""
    definition: Callable[..., Outputs]
    """what a right answer is compared with, in any dtype"""
    costs: Sequence[Cost] = ()
    """one for each phase"""
    batched: tuple[str, ...] = ()
    """the inputs that, like the output, have the batch in front: the definition may run in parts"""
    batch_part: int | None = None
    reference_bytes: int = 0
    """what the published form holds at its peak, where it may not fit"""
    untrainable: dict[str, str] = {}  # noqa: RUF012 (never written to)
    """baselines that would crash in backward, and why"""
    autocast: torch.dtype | None = None
    """what the candidates' products are in: see `autocast`"""


class Row(NamedTuple):
    """One line of the table. ``seconds`` holds medians, and is empty where ours does not match."""

    op: str
    workload: str
    direction: str
    dtype: str
    device: str
    threads: int
    malloc: str
    backend: str
    match: str
    """yes, or what differs"""
    seconds: dict[str, float]
    skipped: dict[str, str]
    """baselines that could not run, and why"""
    peak_bytes: dict[str, int]
    bytes: int = 0
    flops: int = 0
    roof: str = ""
    roof_seconds: float = 0.0
    notes: str = ""
    ratios: dict[str, tuple[float, float]] = {}  # noqa: RUF012 (never written to)
    """for each baseline, between what its time over ours lies: see `noise.interval`"""


def autocast(case: Case, device: str, dtype: torch.dtype) -> Case:
    """The case as people train: every candidate under autocast, everything kept in float32.

    Inputs are rounded to ``dtype`` beforehand: what rounding them costs is no form's merit.
    """
    with torch.no_grad():
        for t in case.inputs.values():
            t.copy_(t.to(dtype))
    candidates = {n: under_autocast(fn, device, dtype) for n, fn in case.candidates.items()}
    return case._replace(candidates=candidates, autocast=dtype)


def under_autocast(
    fn: Callable[..., Outputs], device: str, dtype: torch.dtype
) -> Callable[..., Outputs]:
    def call(**inputs: Tensor) -> Outputs:
        with torch.autocast(device, dtype):
            return fn(**inputs)

    return call


def parameters(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Draws a case's inputs: normal numbers of a given shape and ``std``, wanting gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, std: float = 1.0) -> Tensor:
        t = torch.randn(*shape, device=device, generator=generator) * std
        return t.to(dtype).requires_grad_()

    return randn


def malloc() -> str:
    """Whether freed pages are kept: see `fastadapters.keep_pages`."""
    return "kept" if os.environ.get("FASTADAPTERS_KEEP_PAGES", "0") != "0" else "default"


def leaves(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [t for t in inputs.values() if t.requires_grad]


def stepper(
    fn: Callable[..., Outputs], inputs: dict[str, Tensor], cotangents: tuple[Tensor, ...] | None
) -> Candidate:
    """One call to measure: a forward without gradients, or forward and backward."""

    @torch.no_grad()
    def forward() -> None:
        fn(**inputs)

    def step() -> None:
        torch.autograd.grad(fn(**inputs), wanted, cotangents)

    wanted = leaves(inputs)
    return forward if cotangents is None else step


def measure(
    candidates: dict[str, Candidate],
    device: str = "cpu",
    *,
    budget: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    calls: int = 1,
    settled: Callable[[dict[str, list[float]]], bool] = lambda samples: True,
) -> dict[str, list[float]]:
    """Seconds per call of each candidate, in turns, for about ``budget`` seconds altogether.

    Up to three times as long where ``settled``, given the samples so far, says that noise hides
    what is looked for. The candidates are warm: each has been called before. On a GPU each call
    starts with a cold L2 and is timed by events; clearing the cache keeps the GPU busy while the
    host runs ahead. Where one round takes many times the budget, it is the only one.
    """
    clock = _cuda_clock() if device == "cuda" else _cpu_clock
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    start = time.perf_counter()
    for i in range(max_rounds):
        elapsed = time.perf_counter() - start
        if i >= min_rounds and elapsed > budget and (elapsed > 3 * budget or settled(samples)):
            break
        if i > 0 and elapsed > 5 * budget > 0:
            break
        for name in order.sample(names, len(names)):
            samples[name].append(clock(candidates[name], calls))
    return samples


def _cpu_clock(fn: Candidate, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    return (time.perf_counter() - start) / calls


def _cuda_clock() -> Callable[[Candidate, int], float]:
    cache = torch.cuda.get_device_properties("cuda").L2_cache_size
    flush = torch.empty(max(4 * cache, 256 << 20), dtype=torch.uint8, device="cuda")

    def clock(fn: Candidate, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        for _ in range(calls):
            fn()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls

    return clock


def roofs(device: str, dtype: torch.dtype, nbytes: int) -> dict[str, tuple[Candidate, int]]:
    """The roofs as candidates: a copy that moves ``nbytes``, GEMMs; with bytes and FLOPs.

    A CPU without 16-bit products multiplies in float32, which may then be the faster GEMM.
    """
    source, target = torch.ones(2, max(nbytes // 2, 1), dtype=torch.uint8, device=device)
    n = 8192 if device == "cuda" else 1024
    found: dict[str, tuple[Candidate, int]] = {
        "copy": (lambda: target.copy_(source), 2 * source.numel())
    }
    for kind in {dtype, torch.float32} if device == "cpu" else {dtype}:
        a, b, c = torch.randn(3, n, n, device=device).to(kind)
        found[f"gemm {kind}"] = (lambda a=a, b=b, c=c: torch.mm(a, b, out=c), 2 * n**3)
    for fn, _ in found.values():
        fn()
    return found


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def evaluate(
    fn: Callable[..., Outputs],
    inputs: dict[str, Tensor],
    cotangents: tuple[Tensor, ...] | None,
    dtype: torch.dtype,
    batched: tuple[str, ...] = (),
    part: int | None = None,
) -> dict[str, Tensor]:
    """Outputs, and with ``cotangents`` gradients, in ``dtype``; ``part`` items at a time."""
    args = {n: t.detach().to(dtype).requires_grad_(t.requires_grad) for n, t in inputs.items()}
    size = args[batched[0]].shape[0] if batched else 1
    outputs = []
    torch.manual_seed(0)
    for i in range(0, size, part or size):
        rows = slice(i, i + part) if part else slice(None)
        with torch.set_grad_enabled(cotangents is not None):
            out = as_tuple(fn(**{n: t[rows] if n in batched else t for n, t in args.items()}))
        if cotangents is not None:
            torch.autograd.backward(out, [c[rows].to(dtype) for c in cotangents])
        outputs.append([o.detach() for o in out])
    named = {f"output {i}": torch.cat(o) for i, o in enumerate(zip(*outputs, strict=True))}
    if cotangents is not None:
        named |= {f"gradient of {n}": t.grad for n, t in args.items() if t.requires_grad}
    return named


def match(case: Case, cotangents: tuple[Tensor, ...] | None) -> str:
    """``yes`` if ours meets the tolerance rule of the tests, else what does not."""
    parts = (case.batched, case.batch_part)
    first = next(iter(case.inputs.values()))
    dtype, published = first.dtype, case.definition
    if case.autocast is not None:
        published = under_autocast(published, first.device.type, case.autocast)

    def pair(draw: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        moved = {
            n: last_bit(t.detach(), draw, case.autocast or dtype).requires_grad_(t.requires_grad)
            for n, t in case.inputs.items()
        }
        gold = evaluate(case.definition, moved, cotangents, torch.float64, *parts)
        return gold, evaluate(published, moved, cotangents, dtype, *parts)

    out = evaluate(case.candidates["ours"], case.inputs, cotangents, dtype)
    try:
        check_all(out, pair)
    except AssertionError as error:
        return str(error).strip().splitlines()[0]
    return "yes"


def peak_bytes(fn: Candidate, device: str) -> int:
    """The most memory that one call holds beyond what was allocated before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fn()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        fn()
    records = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for record in sorted(records, key=lambda e: e.start_ns()):
        held += record.nbytes()
        peak = max(peak, held)
    return peak


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def run(
    case: Case, *, training: bool, device: str, threads: int, budget: float, full: bool
) -> tuple[Row, list[float]]:
    """The row of a case, and the samples of ours (none where it does not match)."""
    torch.set_num_threads(threads)
    torch.compiler.reset()
    torch.manual_seed(0)
    ours = case.candidates["ours"]
    with torch.no_grad():
        outputs: list[Outputs] = []
        decisions = fastadapters.explain(lambda: outputs.append(ours(**case.inputs)))
    dtype = as_tuple(outputs[0])[0].dtype
    products = case.autocast or dtype
    cotangents = tuple(map(torch.randn_like, as_tuple(outputs.pop()))) if training else None
    row = Row(
        case.op, case.workload, "training step" if training else "forward",
        "autocast" if case.autocast else str(dtype).removeprefix("torch."), device, threads,
        malloc(), decisions[0].backend, match(case, cotangents), {}, {}, {},
    )  # fmt: skip
    if row.match != "yes":
        return row, []

    steps: dict[str, Candidate] = {}
    peaks: dict[str, int] = {}
    warm: dict[str, float] = {}
    skipped = dict(case.untrainable) if training else {}
    if case.reference_bytes > free_bytes(device):
        for name in ("reference", *(f"{label} reference" for label in COMPILE_MODES)):
            skipped[name] = f"needs about {case.reference_bytes / 2**30:.0f} GiB"

    def take(name: str, fn: Callable[..., Outputs], *, compiled: bool = False) -> None:
        step = stepper(fn, case.inputs, cotangents)
        try:
            if compiled:
                step()
            start = time.perf_counter()
            peaks[name] = peak_bytes(step, device)
        except (RuntimeError, MemoryError) as error:
            if name == "ours":
                raise
            skipped[name] = str(error).strip().splitlines()[0]
            return
        warm[name] = time.perf_counter() - start
        steps[name] = step

    for name, fn in case.candidates.items():
        if name not in skipped:
            take(name, fn)
    compilable = [name for name in ("reference", "eager") if name in steps]
    for label in COMPILE_MODES if full else ["compiled"]:
        # torch.compile of the better one, unless there is time for both
        for name in compilable if full else [min(compilable, key=warm.__getitem__)]:
            if f"{label} {name}" not in skipped:
                mode = COMPILE_MODES[label]
                fn = torch.compile(case.candidates[name], dynamic=False, mode=mode)
                take(f"{label} {name}", fn, compiled=True)
    others = [name for name in steps if name != "ours"]
    moved = [cost.elements * dtype.itemsize for cost in case.costs]
    limits = roofs(device, products, moved[0])
    samples = measure(
        steps | {n: fn for n, (fn, _) in limits.items()},
        device,
        budget=budget,
        min_rounds=6,
        settled=lambda samples: all(is_settled(*r, 1.0) for r in ratios(samples, others).values()),
    )
    seconds = {name: statistics.median(values) for name, values in samples.items()}
    per_second = {name: amount / seconds.pop(name) for name, (_, amount) in limits.items()}
    copied = per_second.pop("copy")
    phases = [
        (n / copied, cost.flops / max(per_second.values()))
        for n, cost in zip(moved, case.costs, strict=True)
    ]
    memory, compute = (sum(times) for times in zip(*phases, strict=True))
    row = row._replace(
        seconds=seconds,
        skipped=skipped,
        peak_bytes=peaks,
        bytes=sum(moved),
        flops=sum(cost.flops for cost in case.costs),
        roof="memory" if memory > compute else "compute",
        roof_seconds=sum(max(phase) for phase in phases),
        ratios=ratios(samples, others),
    )
    return row, samples["ours"]


def machine() -> dict[str, Any]:
    """What a number depends on besides the code."""
    about = {
        "torch": torch.__version__,
        "fastadapters": fastadapters.__version__,
        "malloc": malloc(),
        "backends": fastadapters.backends.status(),
    }
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    return about

"""Whether `auto` loses to `eager` anywhere: every op with kernels, forward and training step.

    python -m benches.auto              # eight minutes on two cores
    python -m benches.auto --compile    # and against torch.compile, in an hour

A cell is two calls of one function, as `auto` runs it and on backend `eager`, which take turns
until it is plain which is faster: most cells are settled in three rounds, those near to equal get
as many as their budget has. In 16-bit dtypes that this CPU does not multiply PyTorch takes minutes
for what is otherwise a second: there the batch is smaller, as `auto` never goes by it.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

import fastadapters

from . import (
    test_bottleneck,
    test_cross_modal_attention,
    test_multimodal,
    test_sequence_fusion,
    workloads,
)
from .harness import Candidate, Case, Outputs, as_tuple, autocast, stepper
from .report import markdown

LOSES = 0.97  # of eager: what is below is no noise
CLEAR = 1.15  # by this factor off it no round is on the other side by chance
ROUNDS = 41
DTYPES = ("float32", "bfloat16", "autocast")
Cases = Callable[..., Case]

# Of the head's workloads, those of data sets of about as many classes stand for each other.
TABLE: list[tuple[Cases, Sequence[Any]]] = [
    (test_bottleneck.case, workloads.BOTTLENECK),
    (test_cross_modal_attention.case, workloads.CROSS_MODAL_ATTENTION),
    (test_sequence_fusion.case, workloads.SEQUENCE_FUSION),
    (
        test_multimodal.case,
        [w for w in workloads.MULTIMODAL if w.classes in (10, 100, 397, 1000)
         and w.name != "FGVCAircraft"],
    ),
]  # fmt: skip


class Cell(NamedTuple):
    op: str
    workload: str
    dtype: str
    direction: str
    threads: int
    backend: str
    """what `auto` chose"""
    ratio: float
    """of eager's time to that of `auto`, the median of the rounds; 1 where `auto` is `eager`"""
    rounds: int
    compiled: float | None = None
    """as ``ratio``, of torch.compile of eager; None where that was not measured"""


def settled(ratios: Sequence[float]) -> bool:
    """Whether more rounds would not change which side of `LOSES` the median is on.

    Either every round is far from it, or so many are on one side that chance alone would put them
    there once in 30 times or less: of six all, of sixteen thirteen.
    """
    if len(ratios) < 3:
        return False
    if min(ratios) > LOSES * CLEAR or max(ratios) < LOSES / CLEAR:
        return True
    above = sum(r >= LOSES for r in ratios)
    return abs(2 * above - len(ratios)) >= 2.4 * len(ratios) ** 0.5


def duel(ours: Candidate, eager: Candidate, budget: float) -> list[float]:
    """Ratios of eager's time to that of ours, of rounds in turns, until settled or out of budget.

    Where the first calls show a wide gap between long times, they are all there is.
    """

    def clock(fn: Candidate, calls: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        return (time.perf_counter() - start) / calls

    first = clock(ours), clock(eager)
    if first[1] > budget / 4 and first[1] > 2 * first[0]:
        return [first[1] / first[0]]
    calls = max(1, int(2e-3 / max(min(first), 1e-6)))
    order, ratios = random.Random(0), []
    start = time.perf_counter()
    while len(ratios) < ROUNDS and not settled(ratios):
        times = {}
        for fn in order.sample((ours, eager), 2):
            times[fn] = clock(fn, calls)
        ratios.append(times[eager] / times[ours])
        if len(ratios) >= 5 and time.perf_counter() - start > budget:
            break
    return ratios


def on_backend(name: str, fn: Callable[..., Outputs]) -> Callable[..., Outputs]:
    def call(**inputs: Any) -> Outputs:
        with fastadapters.backend(name):
            return fn(**inputs)

    return call


def smaller(workload: Any) -> Any:
    """With an eighth of the rows."""
    batch = workload.batch
    if batch == 1:
        return workload._replace(tokens=workload.tokens // 8)
    return workload._replace(batch=max(1, batch // 8))


def cells(
    case: Case, dtype: str, threads: Sequence[int], budget: float, compiles: bool = False
) -> Iterator[Cell]:
    ours = case.candidates["ours"]
    forms = [on_backend("auto", ours), on_backend("eager", ours)]
    if compiles:
        torch.compiler.reset()
        forms.append(torch.compile(case.candidates["eager"], dynamic=False))
    with torch.no_grad():
        outputs: list[Outputs] = []
        decisions = fastadapters.explain(lambda: outputs.append(ours(**case.inputs)))
    cotangents = tuple(map(torch.randn_like, as_tuple(outputs.pop())))
    for direction, given in (("forward", None), ("training step", cotangents)):
        candidates = [stepper(fn, case.inputs, given) for fn in forms]
        crashes = given is not None and "compiled eager" in case.untrainable
        for n in threads:
            torch.set_num_threads(n)
            chosen = decisions[0].backend
            ratios = [] if chosen == "eager" else duel(candidates[0], candidates[1], budget)
            ratio = statistics.median(ratios or [1.0])
            cell = Cell(case.op, case.workload, dtype, direction, n, chosen, ratio, len(ratios))
            if compiles and not crashes:
                candidates[2]()  # compiles, for this number of threads
                rounds = duel(candidates[0], candidates[2], budget / 3)
                cell = cell._replace(compiled=statistics.median(rounds))
            yield cell


def measure(
    dtypes: Sequence[str], threads: Sequence[int], budget: float, compiles: bool
) -> Iterator[Cell]:
    slow = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for make_case, table in TABLE:
        for workload in table:
            for dtype in dtypes:
                w = workload.on("cpu")
                if slow and dtype != "float32" and make_case is not test_multimodal.case:
                    w = smaller(w)  # the head computes in float32
                if dtype == "autocast":
                    case = autocast(make_case(w, "cpu", torch.float32), "cpu", torch.bfloat16)
                else:
                    case = make_case(w, "cpu", getattr(torch, dtype))
                yield from cells(case, dtype, threads, budget, compiles)


def table(found: Sequence[Cell]) -> str:
    """A line for each workload and dtype: against eager / compiled eager; bold where it loses."""
    places = sorted({(c.direction, c.threads) for c in found})
    lines: dict[tuple[str, ...], dict[tuple[str, int], str]] = {}
    for c in found:
        text = f"**{c.ratio:.2f}**" if c.ratio < LOSES else f"{c.ratio:.2f}"
        if c.compiled is not None:
            text += f" / {c.compiled:.2f}"
        key = (c.op, c.workload, c.dtype, c.backend)
        lines.setdefault(key, {})[c.direction, c.threads] = text
    head = ("op", "workload", "dtype", "backend")
    head += tuple(f"{direction}, {n} thread{'s' * (n > 1)}" for direction, n in places)
    rows = [[*key, *(line.get(place, "-") for place in places)] for key, line in lines.items()]
    lost = sum(c.ratio < LOSES for c in found)
    return f"{markdown(head, rows)}\n\n{lost} of {len(found)} below {LOSES} of eager."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default=",".join(DTYPES), help="comma-separated")
    parser.add_argument("--threads", default=f"1,{os.cpu_count()}", help="comma-separated")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a cell takes at most")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile, too")
    args = parser.parse_args()
    threads = [*map(int, args.threads.split(","))]
    found = []
    for cell in measure(args.dtype.split(","), threads, args.budget, args.compile):
        times = f"{cell.ratio:.2f} ({cell.rounds})"
        if cell.compiled is not None:
            times += f", compiled {cell.compiled:.2f}"
        print(*cell[:6], times, sep=" | ", flush=True)
        found.append(cell)
    print(f"\n{table(found)}")


if __name__ == "__main__":
    main()

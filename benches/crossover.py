"""The table of `auto`: up to which sizes each kernel beats the best plain PyTorch.

    python -m benches.crossover          # measures this CPU, in about 15 minutes
    python -m benches.crossover --gpu    # computes what benches/model_*.py know
    python -m benches.crossover --gpu multimodal    # ... of one op

Both print what they find and put the entries into fastadapters/crossover.py.

On a CPU a thread's own time is measured, of calls that take turns: a busy neighbour matters little.
FASTADAPTERS_CPU_ISA measures another instruction set, against what PyTorch runs at its best.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

import fastadapters
from fastadapters import backends, crossover, eager, functional
from fastadapters.crossover import LIMITS, Limit
from fastadapters.info import cpu_name

from .harness import Candidate, parameters, stepper

TABLE = Path(crossover.__file__)
Key = tuple[str, str, str, torch.dtype]
Points = dict[tuple[int, int], float]  # (D, r) to the worst ratio of times, eager's to ours

ROWS = 1576  # eight images of 197 tokens
DIMS = (256, 768, 1024, 4096)
WIDTHS = (4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 2048, 3072, 4096)
# What a clock cannot tell from equal.
EQUAL = 0.97
MODELLED = ["bottleneck", "multimodal", "cross_modal_attention"]
# Bytes of the two weights and FLOPs of a step beyond which nothing is measured.
LARGEST = 4 << 20
SLOWEST = 1e11


def sum_up(points: Points, source: str) -> Limit:
    """The limit that admits the most points where the kernel wins, and none where it loses."""
    lost = [(d, r) for (d, r), ratio in points.items() if ratio < EQUAL]
    won = [point for point in points if point not in lost]
    best, count = Limit(0, 0, source), 0
    for width in sorted({r for _, r in won}, reverse=True):
        bound = min((d * r for d, r in lost if r <= width), default=None)
        weights = [d * r for d, r in won if r <= width and (bound is None or d * r < bound)]
        if len(weights) > count:
            best, count = Limit(width, max(weights), source), len(weights)
    return best


def _thread_times(candidates: list[Candidate], budget: float) -> list[float]:
    """The median of each one's seconds, taken in turns."""
    samples: list[list[float]] = [[] for _ in candidates]
    for fn in candidates:
        fn()
    start = time.perf_counter()
    while len(samples[0]) < 30 and (len(samples[0]) < 3 or time.perf_counter() - start < budget):
        for fn, times in zip(candidates, samples, strict=True):
            begin = time.thread_time()
            fn()
            times.append(time.thread_time() - begin)
        if time.perf_counter() - start > 10 * budget:
            break
    return [statistics.median(times) for times in samples]


def _ours(*args: Tensor, **options: Tensor) -> Tensor:
    with fastadapters.backend("cpu"):
        return functional.bottleneck(*args, **options)


def worst_ratio(d: int, r: int, dtype: torch.dtype, rows: int, budget: float) -> float:
    """Of forward and training step, with x as residual and with nothing but the two products."""
    randn = parameters("cpu", dtype)
    bare = {
        "x": randn(rows, d),
        "down_weight": randn(r, d, std=d**-0.5),
        "up_weight": randn(d, r, std=r**-0.5),
    }
    usual = bare | {"down_bias": randn(r), "up_bias": randn(d)}

    def adapter(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, **rest: fn(x, **rest, residual=x, scale=0.1)

    def products(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, **rest: fn(x, **rest, activation="identity")

    ratios = []
    dy = (torch.randn(rows, d).to(dtype),)
    for form, inputs in ((adapter, usual), (products, bare)):
        for cotangents in (None, dy):
            steps = [stepper(form(fn), inputs, cotangents) for fn in (_ours, eager.bottleneck)]
            ours, plain = _thread_times(steps, budget)
            ratios.append(plain / ours)
    return min(ratios)


def measure(dtype: torch.dtype, budget: float) -> Points:
    """Each D from the smallest r up, to the second that loses."""
    points: Points = {}
    for d in DIMS:
        lost = 0
        for r in WIDTHS:
            flops = 12 * ROWS * d * r
            if d * r > LARGEST or lost == 2:
                break
            # PyTorch without fast 16-bit products takes minutes
            rows = ROWS if dtype == torch.float32 or flops < SLOWEST / 10 else 64
            points[d, r] = worst_ratio(d, r, dtype, rows, budget)
            lost = lost + 1 if points[d, r] < EQUAL else 0
            print(f"{dtype} D {d} r {r}: {points[d, r]:.2f}", flush=True)
    return points


def this_cpu(dtypes: Iterable[torch.dtype], budget: float) -> dict[Key, Limit]:
    """The entries of the CPU at hand."""
    torch.set_num_threads(1)
    source = f"measured: {cpu_name()}, PyTorch {torch.__version__}"
    return {
        ("bottleneck", "cpu", backends.architecture(torch.device("cpu"), dtype), dtype): sum_up(
            measure(dtype, budget), source
        )
        for dtype in dtypes
    }


def modelled(dtypes: Iterable[torch.dtype], ops: Iterable[str]) -> dict[Key, Limit]:
    """The entries of the GPUs of benches/model.py; the least of them for all others.

    None for an op and dtype where no point loses.
    """
    from .model import GPUS

    found: dict[Key, Limit] = {}
    for op, dtype in itertools.product(ops, dtypes):
        kind = "float32" if dtype == torch.float32 else "bfloat16"  # float16 costs the same
        points = importlib.import_module(f".model_{op}", __package__).points
        of_gpus = {gpu: points(gpu, kind) for gpu in GPUS}
        if all(ratio >= EQUAL for ratios in of_gpus.values() for ratio in ratios.values()):
            print(f"{op} {dtype}: loses nowhere, no limit", flush=True)
            continue
        limits = []
        for gpu, ratios in of_gpus.items():
            limits.append(sum_up(ratios, f"model: {gpu.name}"))
            found[op, "cuda", f"sm_{gpu.arch}", dtype] = limits[-1]
        least = Limit(
            min(limit.width for limit in limits),
            min(limit.weight for limit in limits),
            "model: the least of three GPUs",
        )
        found[op, "cuda", "other", dtype] = least
    return found


def render(limits: dict[Key, Limit]) -> str:
    """The text of fastadapters/crossover.py with these entries."""
    head, mark, _ = TABLE.read_text().partition("LIMITS: ")
    lines = []
    for (op, device, arch, dtype), (width, weight, source) in sorted(
        limits.items(), key=lambda item: (*item[0][:3], str(item[0][3]))
    ):
        lines += [
            f'    ("{op}", "{device}", "{arch}", {dtype}): Limit(',
            f'        {width}, {weight}, "{source}"),',
        ]
    body = "\n".join(lines)
    kind = "dict[tuple[str, str, str, torch.dtype], Limit]"
    return f"{head}{mark}{kind} = {{\n{body}\n}}\n# fmt: on\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gpu", nargs="*", choices=MODELLED, metavar="OP",
        help="from the model instead of this CPU, of these ops or of all",
    )  # fmt: skip
    parser.add_argument("--dtype", default="float32,bfloat16,float16", help="comma-separated")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a pair is measured")
    args = parser.parse_args()
    dtypes = [getattr(torch, name) for name in args.dtype.split(",")]
    if args.gpu is None:
        found = this_cpu(dtypes, args.budget)
    else:
        found = modelled(dtypes, args.gpu or MODELLED)
    for key, limit in found.items():
        print(*key, *limit)
    TABLE.write_text(render({**LIMITS, **found}))


if __name__ == "__main__":
    main()

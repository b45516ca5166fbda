"""An adapter per item: one call, against a loop over `eager` and one adapter over all rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

import fastadapters
from fastadapters import eager, functional, reference

from . import workloads
from .harness import Case, Row, malloc, match, measure, parameters, stepper

WORKLOADS = workloads.GROUPED
QUICK = ("float32",)  # the dtypes measured without --full


def case(w: workloads.Grouped, device: str, dtype: torch.dtype) -> Case:
    randn = parameters(device, dtype)
    n, d, r = w.adapters, w.dim, w.bottleneck
    index = torch.arange(w.batch, device=device) % n  # no two items of an adapter side by side
    inputs = {
        "x": randn(w.batch, w.tokens, d),
        "down_weight": randn(n, r, d, std=d**-0.5),
        "up_weight": randn(n, d, r, std=r**-0.5),
        "down_bias": randn(n, r, std=0.1),
        "up_bias": randn(n, d, std=0.1),
    }
    options = {"activation": "gelu"}

    def grouped(x: Tensor, **stacks: Tensor) -> Tensor:
        return functional.grouped_bottleneck(x, index, **stacks, residual=x, **options)

    def eagerly(**tensors: Tensor) -> Tensor:
        with fastadapters.backend("eager"):
            return grouped(**tensors)

    def loop_over(backend: ModuleType) -> Callable[..., Tensor]:
        """The adapters one after another, each on its items: the best without this op."""

        def loop(x: Tensor, **stacks: Tensor) -> Tensor:
            parts = {name: t.unbind() for name, t in stacks.items()}
            ys = []
            for i in range(n):
                items, own = x[i::n], {name: t[i] for name, t in parts.items()}
                ys.append(backend.bottleneck(items, **own, residual=items, **options))
            return torch.stack(ys, dim=1).flatten(0, 1)

        return loop

    return Case(
        op="grouped_bottleneck",
        workload=f"{w.name}: {[w.batch, w.tokens, d]} r {r}, N {n}",
        inputs=inputs,
        candidates={
            "ours": grouped,
            "eager": eagerly,
            "loop over eager": loop_over(eager),
        },
        definition=loop_over(reference),
    )


def test_grouped(record, workload, dtype, direction, threads, pytestconfig):
    device = pytestconfig.getoption("--device")
    torch.set_num_threads(threads)
    it = case(workload, device, dtype)
    training = direction == "training"
    dy = (torch.randn_like(it.inputs["x"]),) if training else None
    steps = {name: stepper(fn, it.inputs, dy) for name, fn in it.candidates.items()}
    first = {n: t if n == "x" else t[0].detach().requires_grad_() for n, t in it.inputs.items()}
    steps["one adapter"] = stepper(
        lambda x, **own: functional.bottleneck(x, **own, residual=x, activation="gelu"), first, dy
    )
    right = match(it, dy)
    for step in steps.values():
        step()
    samples = measure(steps, device, budget=3.0) if right == "yes" else {}
    seconds = {name: statistics.median(values) for name, values in samples.items()}
    notes = ""
    if seconds:
        against = seconds["loop over eager"] / seconds["ours"]
        share = seconds["one adapter"] / seconds["ours"]
        notes = f"{against:.2f} x a loop over eager, {share:.2f} of one adapter's speed"
    row = Row(
        it.op, it.workload, "training step" if training else "forward",
        str(dtype).removeprefix("torch."), device, threads, malloc(), "", right, seconds, {}, {},
        notes=notes,
    )  # fmt: skip
    record(row, samples.get("ours", []))

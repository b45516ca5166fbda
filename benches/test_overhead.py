"""What a call costs beside the arithmetic: tiny tensors, against the module that is replaced."""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F

from fastadapters.modules import BottleneckAdapter

from . import test_bottleneck, workloads
from .adaptformer import Adapter
from .harness import Row, malloc, match, measure, stepper

WORKLOADS = workloads.OVERHEAD


def test_overhead(record, workload, direction, pytestconfig):
    device = pytestconfig.getoption("--device")
    torch.set_num_threads(1)
    case = test_bottleneck.case(workload, device, torch.float32)
    sizes = (workload.dim, workload.bottleneck)
    module = BottleneckAdapter(*sizes, scale=workload.scale).to(device)
    published = Adapter(*sizes, workload.scale).to(device)
    x, weight, bias = (case.inputs[name] for name in ("x", "down_weight", "down_bias"))
    # The parameters of the module are its own: they get their gradients like those of the others.
    candidates = {
        "ours": (case.candidates["ours"], case.inputs),
        "module": (lambda x, **parameters: module(x), {"x": x, **dict(module.named_parameters())}),
        "published": (
            lambda x, **parameters: published(x),
            {"x": x, **dict(published.named_parameters())},
        ),
        "eager": (case.candidates["eager"], case.inputs),
        "F.linear": (F.linear, {"input": x, "weight": weight, "bias": bias}),
    }
    steps = {}
    cotangents = None
    for name, (fn, inputs) in candidates.items():
        dy = torch.randn_like(fn(**inputs)) if direction == "training" else None
        steps[name] = stepper(fn, inputs, None if dy is None else (dy,))
        if name == "ours":
            cotangents = None if dy is None else (dy,)
    right = match(case, cotangents)
    samples = measure(steps, device, budget=2.0, calls=100) if right == "yes" else {}
    seconds = {name: statistics.median(values) for name, values in samples.items()}
    notes = (
        f"{seconds['published'] / seconds['module']:.2f} x the published module" if seconds else ""
    )
    row = Row(
        "call overhead", f"{workload.name}: {list(x.shape)} r {workload.bottleneck}",
        "training step" if direction == "training" else "forward", "float32", device, 1, malloc(),
        "", right, seconds, {}, {}, notes=notes,
    )  # fmt: skip
    record(row, samples.get("ours", []))

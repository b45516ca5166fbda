"""Samples of the grouped bottleneck: those of the bottleneck, with a stack of adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bottleneck_cases
import torch
from bottleneck_cases import Case
from compare import check_all, last_bit
from torch import Tensor

import fastadapters
from fastadapters.functional import grouped_bottleneck

Tensors = dict[str, Tensor]
ADAPTERS = 4
UNSTACKED = ("x", "residual", "cotangent")


def index_of(case: Case, dims: int = 1, adapters: int = ADAPTERS, seed: int = 0) -> Tensor:
    """An adapter for each of the first ``dims`` dimensions of x; the second occurs nowhere."""
    gen = torch.Generator().manual_seed(seed)
    index = torch.randint(adapters, case.rows[:dims], generator=gen)
    return torch.where(index == 1, 0, index) if adapters > 2 else index


def inputs(case: Case, adapters: int = ADAPTERS, seed: int = 0, device: str = "cpu") -> Tensors:
    """The tensors of a sample; a scale is [N] or [N, D]."""
    samples = [bottleneck_cases.inputs(case, seed + 1000 * n, device) for n in range(adapters)]
    tensors = {
        name: t if name in UNSTACKED else torch.stack([sample[name] for sample in samples])
        for name, t in samples[0].items()
    }
    if case.scale == "learnable":
        tensors["scale"] = tensors["scale"].squeeze(1)
    return tensors


def run(
    case: Case,
    tensors: Tensors,
    index: Tensor,
    backend: str,
    needs: Callable[[str], bool] = lambda name: True,
    op: Callable[..., Tensor] = grouped_bottleneck,
) -> Tensors:
    """``y`` and ``d_<name>`` for every input that ``needs`` a gradient, on ``backend``."""
    leaves = {
        name: t.detach().requires_grad_(needs(name))
        for name, t in tensors.items()
        if name != "cotangent"
    }
    arguments: dict[str, Any] = dict(leaves)
    if case.residual == "x":
        arguments["residual"] = arguments["x"]
    if case.scale == "number":
        arguments["scale"] = 0.6
    x = arguments.pop("x")
    torch.manual_seed(7)
    autocast = torch.autocast(x.device.type, case.dtype, enabled=case.mixed)
    with fastadapters.backend(backend), autocast:
        y = op(
            x,
            index,
            **arguments,
            activation=case.activation,
            dropout=case.dropout,
            input_dropout=case.input_dropout,
            training=True,
        )
        wanted = [name for name in leaves if needs(name)]
        gradients = torch.autograd.grad(y, [leaves[name] for name in wanted], tensors["cotangent"])
    return {"y": y.detach(), **{f"d_{n}": g for n, g in zip(wanted, gradients, strict=True)}}


def check_backend(
    case: Case, index: Tensor, backend: str, device: str = "cpu", **kwargs: Any
) -> Tensors:
    """Outputs and all gradients of ``backend``, under the tolerance rule; inputs untouched."""
    tensors, index = inputs(case, device=device), index.to(device)
    before = {name: t.clone() for name, t in tensors.items()}
    out = run(case, tensors, index, backend, **kwargs)

    def pair(draw: int) -> tuple[Tensors, Tensors]:
        drawn = {name: last_bit(t, draw, case.dtype) for name, t in tensors.items()}
        rounded = {n: (t if case.mixed else t.to(case.dtype)).double() for n, t in drawn.items()}
        return run(case, rounded, index, "reference"), run(case, drawn, index, "reference")

    check_all(out, pair, str(case))
    for name, t in tensors.items():
        assert torch.equal(t, before[name]), f"{case}: {name} was written to"
    return out

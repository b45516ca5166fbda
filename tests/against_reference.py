"""Comparison of a backend with the reference, for ops given as functions of named tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from compare import check_all, last_bit
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastadapters

Tensors = dict[str, Tensor]
Op = Callable[[Tensors], "Tensor | tuple[Tensor, ...]"]


def run(op: Op, tensors: Tensors, backend: str) -> Tensors:
    """Outputs, and the gradient of every tensor (zeros where nothing depends on it)."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    with fastadapters.backend(backend):
        outs = op(leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    gen = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=gen).to(out) for out in outs]
    gradients = torch.autograd.grad(
        outs, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
    )
    results = {f"out {i}": out.detach() for i, out in enumerate(outs)}
    return results | dict(zip((f"d_{name}" for name in leaves), gradients, strict=True))


def check_against_reference(op: Op, tensors: Tensors, name: str, backend: str = "eager") -> None:
    """Outputs and all gradients under the tolerance rule; inputs untouched.

    In float64 the rule's base is its gold: there `check_float64` compares.
    """
    if all(t.dtype == torch.float64 for t in tensors.values()):
        return check_float64(op, tensors, name, backend)
    before = {key: t.clone() for key, t in tensors.items()}
    out = run(op, tensors, backend)
    for key, t in tensors.items():
        assert torch.equal(t, before[key]), f"{name}: {key} was written to"

    dtype = next(iter(tensors.values())).dtype

    def pair(draw: int) -> tuple[Tensors, Tensors]:
        moved = {key: last_bit(t, draw, dtype) for key, t in tensors.items()}
        gold = run(op, {key: t.double() for key, t in moved.items()}, "reference")
        return gold, run(op, moved, "reference")

    check_all(out, pair, name)


def check_float64(op: Op, tensors: Tensors, name: str, backend: str = "eager") -> None:
    """Outputs and all gradients in float64 as exact as the golden vectors ask: 1e-10, relatively.

    For samples too small for the statistics of the tolerance rule.
    """
    tensors = {key: t.double() for key, t in tensors.items()}
    before = {key: t.clone() for key, t in tensors.items()}
    out, gold = run(op, tensors, backend), run(op, tensors, "reference")
    assert out.keys() == gold.keys()
    for key, t in tensors.items():
        assert torch.equal(t, before[key]), f"{name}: {key} was written to"
    size = max((t.abs().max().item() for t in gold.values() if t.numel()), default=0.0)
    for key, expected in gold.items():
        assert out[key].shape == expected.shape, f"{name} {key}: {out[key].shape}"
        error = (out[key] - expected).abs().max().item() if expected.numel() else 0.0
        assert error <= 1e-10 * size, f"{name} {key}: {error:.1e}"


def check_compiled(op: Op, samples: Iterable[Tensors], backend: str = "inductor") -> None:
    """Outputs and gradients under torch.compile: the same, in one graph and two compilations."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(op, backend=counter, fullgraph=True)
    for tensors in samples:
        results = (run(fn, tensors, "auto") for fn in (compiled, op))
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 2

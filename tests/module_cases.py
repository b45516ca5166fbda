"""The modules that the tests build, their inputs, and how results are compared."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from against_reference import run
from torch import Tensor, nn
from torch.func import functional_call

from fastadapters import (
    AlignmentEnhancer,
    BottleneckAdapter,
    MultiModalAdapter,
    MultiwayAdapter,
    WanderAdapter,
    backends,
)

sys.path.append(str(Path(__file__).parent.parent))

from benches import adaptformer  # noqa: F401

BACKENDS = ["eager"] + [name for name in ("cpu",) if backends.unavailable(name) is None]
PLAIN = ["reference", "eager"]
INF = math.inf
D = 24

# Of each module: how to build it, and the shapes of its inputs.
KINDS: dict[str, tuple[Callable[..., nn.Module], list[tuple[int, ...]]]] = {
    "bottleneck": (
        partial(BottleneckAdapter, D, 7, layernorm="in", scale="channel"),
        [(3, 5, D)],
    ),
    "multiway": (
        partial(MultiwayAdapter, D, 7, layernorm="out", scale="learnable"),
        [(3, 5, D)],
    ),
    "enhancer": (partial(AlignmentEnhancer, D, 40), [(3, 5, D)]),
    "multimodal": (
        partial(MultiModalAdapter, D, 16, 4, downsample="mlp", upsample="mlp", hidden_dim=8),
        [(6, D), (3, D)],
    ),
    "wander": (
        partial(WanderAdapter, D, (5, 7), 6, feature_rank=2, time_rank=3),
        [(3, 5, D), (3, 7, D)],
    ),
}
every_module = pytest.mark.parametrize("kind", KINDS)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def randomize(module: nn.Module) -> nn.Module:
    """Draw all parameters, so that none is 0 or 1 as an init would have it."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            t = randn(*p.shape, seed=i + 1)
            p.copy_(t * p.shape[-1] ** -0.5 if p.dim() > 1 else 0.5 + 0.5 * t)
    return module


def sample(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    return randomize(KINDS[kind][0](dtype=dtype, **options))


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(*shape, seed=i + 100, dtype=dtype) for i, shape in enumerate(KINDS[kind][1])]


def call(module: nn.Module, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The module's outputs."""
    if isinstance(module, MultiwayAdapter):
        return (module(*tensors, split=2),)
    if isinstance(module, WanderAdapter):
        return (module(tensors),)
    outs = module(*tensors)
    return outs if isinstance(outs, tuple) else (outs,)


def reset(module: nn.Module) -> None:
    """Draw the initial parameters again; a `MultiwayAdapter` has none of its own."""
    for part in module.children() if isinstance(module, MultiwayAdapter) else [module]:
        part.reset_parameters()


def assert_equal(outs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for out, want in zip(outs, expected, strict=True):
        assert torch.equal(out, want)


def assert_exact(out: Tensor, expected: Tensor, name: str = "") -> None:
    """Equal in float64 but for the order of the operations."""
    assert out.dtype == torch.float64
    assert out.shape == expected.shape, f"{name}: {out.shape}, not {expected.shape}"
    error = (out - expected).abs().max().item()
    assert error <= 1e-12 * expected.abs().max().item(), f"{name}: {error:.1e}"


def assert_same_results(
    module: Callable[[dict[str, Tensor]], Tensor],
    expected: Callable[[dict[str, Tensor]], Tensor],
    tensors: dict[str, Tensor],
) -> None:
    """Two ops of the tensors, in float64: outputs and all gradients, next to the largest of them.

    A sum can cancel: a scale in front of a LayerNorm has no gradient but for its eps.
    """
    exact = {name: t.double() for name, t in tensors.items()}
    got, want = run(module, exact, "reference"), run(expected, exact, "reference")
    assert got.keys() == want.keys()
    size = max(t.abs().max().item() for t in want.values())
    for name, t in got.items():
        assert t.shape == want[name].shape, name
        error = (t - want[name]).abs().max().item()
        assert error <= 1e-12 * size, f"{name}: {error:.1e}"


def with_parameters(
    module: nn.Module, **tensors: Tensor
) -> tuple[dict[str, Tensor], Callable[[nn.Module, Any], Callable[[dict[str, Tensor]], Tensor]]]:
    """``tensors`` and the module's parameters by name, and what makes a module an op of these.

    The op calls ``module(x, *arguments, residual)``, the residual if there is one.
    """
    named = {**tensors, **{name: p.detach() for name, p in module.named_parameters()}}

    def as_op(module: nn.Module, *arguments: Any) -> Callable[[dict[str, Tensor]], Tensor]:
        def op(t: dict[str, Tensor]) -> Tensor:
            parameters = {name: value for name, value in t.items() if name not in tensors}
            args = (t["x"], *arguments, *([t["residual"]] if "residual" in t else []))
            y: Tensor = functional_call(module, parameters, args)
            return y

        return op

    return named, as_op


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": lambda z: z.clamp_min(0.0),
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
    "gelu_tanh": lambda z: z * (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2,
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "quick_gelu": lambda z: z / (1 + torch.exp(-1.702 * z)),
}

"""What a forward keeps for its backward: what the gradients asked for read, and no more."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from bottleneck_cases import Case, inputs
from torch import Tensor

import fastadapters
from fastadapters import backends
from fastadapters.functional import BottleneckParameters, bottleneck, multiway_bottleneck

pytestmark = pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason="needs the compiled library"
)
M, D, R = 64, 96, 16
PARAMETERS = ("down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias")

Op = Callable[[Tensor, "dict[str, Tensor]", "Tensor | None"], Tensor]


def published(x: Tensor, p: dict[str, Tensor], residual: Tensor | None) -> Tensor:
    """AdaptFormer's forward."""
    normed = F.layer_norm(x, (D,), p["norm_weight"], p["norm_bias"]) if "norm_weight" in p else x
    h = F.relu(F.linear(normed, p["down_weight"], p["down_bias"]))
    y = F.linear(h, p["up_weight"], p["up_bias"]) * p.get("scale", 0.5)
    return y if residual is None else y + residual


def ours(x: Tensor, p: dict[str, Tensor], residual: Tensor | None) -> Tensor:
    return bottleneck(x, **{"scale": 0.5, **p}, residual=residual)


def both_ways(x: Tensor, p: dict[str, Tensor], residual: Tensor | None) -> Tensor:
    side = BottleneckParameters(**{"scale": 0.5, **p})
    return multiway_bottleneck(x, M // 4, side, side, residual=residual)


def saved(
    op: Op, x: Tensor, p: dict[str, Tensor], residual: Tensor | None
) -> tuple[int, set[str], Tensor]:
    """Bytes saved beside the parameters, which of these are saved, and the result."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), fastadapters.backend("cpu"):
        y = op(x, p, residual)
    names = {t.untyped_storage().data_ptr(): name for name, t in p.items()}
    beside = sum(size for pointer, size in storages.items() if pointer not in names)
    return beside, {names[pointer] for pointer in storages if pointer in names}, y


def sample(norm: str, scale: str, requires: set[str]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    tensors = inputs(Case(rows=(2, M // 2), d=D, r=R, norm=norm, scale=scale, residual="other"))
    del tensors["cotangent"]
    for name, t in tensors.items():
        t.requires_grad_(name in requires)
    return tensors.pop("x"), tensors.pop("residual"), tensors


KINDS = [("none", "number"), ("both", "number"), ("none", "channel"), ("both", "learnable")]
PATTERNS = [
    frozenset(c)
    for names in [("x", *PARAMETERS[:4], "scale", "residual"), ("x", "norm_weight", "norm_bias")]
    for n in range(1, len(names) + 1)
    for c in itertools.combinations(names, n)
]


@pytest.mark.parametrize("op", [ours, both_ways])
@pytest.mark.parametrize("residual", ["x", "other", "none"])
@pytest.mark.parametrize(("norm", "scale"), KINDS)
def test_no_more_than_the_published_module(norm, scale, residual, op) -> None:
    """For every pattern of requires_grad; and what is saved suffices: the gradients are right."""
    small = (M * 2 + D) * 4 + 16  # LayerNorm's statistics, and the dropout seed where there is one
    for requires in PATTERNS:
        x, other, p = sample(norm, scale, requires)
        leaves = [t for t in (x, other, *p.values()) if t.requires_grad]
        added = {"x": x, "other": other, "none": None}[residual]
        used = [t for t in leaves if t is not other or added is other]
        if not used:
            continue
        measured, read, y = saved(op, x, p, added)
        allowed, _, expected = saved(published, x, p, added)
        assert measured <= allowed + small, (sorted(requires), measured, allowed)
        if requires <= {"up_weight", "up_bias", "residual"}:
            assert read <= {"scale"}
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, used, dy)
        for ours_, theirs in zip(got, torch.autograd.grad(expected, used, dy), strict=True):
            torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-4)


def test_a_frozen_adapter_keeps_its_hidden_rows_alone() -> None:
    x, _, p = sample("none", "number", {"x"})
    measured, _, _ = saved(ours, x, p, x)
    assert measured == M * R * 4


def test_under_compile() -> None:
    torch._dynamo.reset()
    x, _, p = sample("none", "number", {"x"})
    measured, _, y = saved(torch.compile(ours, fullgraph=True), x, p, x)
    assert measured == M * R * 4
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, torch.autograd.grad(published(x, p, x), x, dy)[0])

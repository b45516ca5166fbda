"""The modules under autocast next to the published ones: dtype by dtype, and how far from fp32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compare import check_all, last_bit
from module_cases import BACKENDS, D, adaptformer, randn, randomize
from torch import Tensor, nn

import fastadapters
from fastadapters import AlignmentEnhancer, BottleneckAdapter, MultiwayAdapter

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")
HALF = [torch.bfloat16, torch.float16]


class FeedForward(nn.Module):
    """torchscale's FeedForwardNetwork and the residual around it, operation for operation."""

    def __init__(self, subln: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(D, 40)
        self.fc2 = nn.Linear(40, D)
        self.ffn_layernorm = nn.LayerNorm(40) if subln else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        h = nn.functional.gelu(h.float()).type_as(h)
        if self.ffn_layernorm is not None:
            h = self.ffn_layernorm(h)
        y: Tensor = x + self.fc2(h)
        return y


class Multiway(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name in ("vision", "text"):
            self.add_module(f"adaptmlp_{name}", adaptformer.Adapter(D, 7, **options))

    def forward(self, x: Tensor, split: int, **options: Any) -> Tensor:
        parts = (x[:, :split], x[:, split:])
        if "residual" in options:
            residual = options.pop("residual")
            halves = [
                {**options, "residual": r} for r in (residual[:, :split], residual[:, split:])
            ]
        else:
            halves = [options, options]
        adapters = (self.adaptmlp_vision, self.adaptmlp_text)
        outs = [f(t, **o) for f, t, o in zip(adapters, parts, halves, strict=True)]
        return torch.cat(outs, dim=1)


OPTIONS: list[dict[str, Any]] = [
    {"layernorm": layernorm, "scale": scale}
    for layernorm in (None, "in", "out")
    for scale in (0.6, "learnable")
]
PAIRS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    **{
        f"bottleneck {options}": (
            lambda options=options: BottleneckAdapter(D, 7, **options),
            lambda options=options: adaptformer.Adapter(D, 7, **options),
            {},
        )
        for options in OPTIONS
    },
    **{
        f"multiway {options}": (
            lambda options=options: MultiwayAdapter(D, 7, **options),
            lambda options=options: Multiway(**options),
            {"split": 13},
        )
        for options in OPTIONS[:5]
    },
    "enhancer": (lambda: AlignmentEnhancer(D, 40), lambda: FeedForward(False), {}),
    "enhancer subln": (
        lambda: AlignmentEnhancer(D, 40, subln=True), lambda: FeedForward(True), {}
    ),
}  # fmt: skip


def step(
    module: nn.Module, x: Tensor, residual: str, arguments: dict[str, Any]
) -> dict[str, Tensor]:
    """Output, and the gradients of inputs and parameters."""
    leaves = {"x": x.detach().requires_grad_(), **dict(module.named_parameters())}
    extra: dict[str, Any] = {}
    if residual == "none":
        extra["add_residual"] = False
    elif residual != "x":
        dtype = x.dtype if x.dtype == torch.float64 else getattr(torch, residual)
        t = randn(*x.shape, seed=50).to(dtype).requires_grad_()
        leaves["residual"] = extra["residual"] = t
    y = module(leaves["x"], **arguments, **extra)
    dy = randn(*y.shape, seed=9).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


CASES = [
    (name, residual)
    for name in PAIRS
    for residual in (["x"] if "enhancer" in name else ["x", "none", "float32", "bfloat16"])
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "residual"), CASES)
def test_as_published_under_autocast(
    name: str, residual: str, x_dtype: torch.dtype, backend: str
) -> None:
    """Output and gradients: the dtypes of the published module, values under the rule."""
    if backend == "cpu" and "subln" in name:
        backend = "auto"
    build, build_published, arguments = PAIRS[name]
    ours, published = build(), build_published()
    randomize(ours)
    published.load_state_dict(ours.state_dict())
    x = randn(4, 33, D).to(x_dtype)
    with torch.autocast("cpu", torch.bfloat16), fastadapters.backend(backend):
        out = step(ours, x, residual, arguments)

    def pair(draw: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        moved = copy.deepcopy(published)
        for p in moved.parameters():
            p.data = last_bit(p.data, draw, torch.bfloat16)
        gold = step(copy.deepcopy(moved).double(), x.double(), residual, arguments)
        with torch.autocast("cpu", torch.bfloat16):
            return gold, step(moved, x, residual, arguments)

    check_all(out, pair, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("init", ["lora", "bert"])
def test_a_stack_is_as_near_to_fp32_as_the_published_one(
    init: str, dtype: torch.dtype, backend: str
) -> None:
    """24 adapters in a row on an fp32 stream: where they start as the identity they are it."""
    torch.manual_seed(0)
    layers, d = 24, 64
    ours = nn.Sequential(*(BottleneckAdapter(d, 16, init=init) for _ in range(layers)))
    if init == "bert":
        for p in ours.parameters():
            p.data *= 4
    published = nn.Sequential(*(adaptformer.Adapter(d, 16, 1.0) for _ in range(layers)))
    published.load_state_dict(ours.state_dict())
    x = torch.randn(4, 50, d)
    dy = torch.randn_like(x)

    def run(module: nn.Module) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = module(leaf)
        assert y.dtype == torch.float32
        return [y.detach(), *torch.autograd.grad(y, leaf, dy)]

    exact = run(published)
    with torch.autocast("cpu", dtype), fastadapters.backend(backend):
        got, base = run(ours), run(published)
    if init == "lora":
        assert torch.equal(got[0], x) and torch.equal(got[1], dy)
    for out, as_published, gold in zip(got, base, exact, strict=True):
        error, published_error = ((t - gold).square().mean().sqrt() for t in (out, as_published))
        assert error <= 1.1 * published_error


@pytest.mark.parametrize("layernorm", [None, "in", "out"])
@pytest.mark.parametrize("scale", [0.5, "learnable"])
def test_float64_under_autocast(layernorm: Any, scale: Any) -> None:
    """Autocast leaves float64 alone, and so what is behind the op."""
    module = randomize(BottleneckAdapter(D, 7, layernorm=layernorm, scale=scale))
    x = randn(3, D, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert torch.equal(y, module(x))

"""`BottleneckAdapter`: its inits, and its formula in PyTorch ops."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from against_reference import check_against_reference
from module_cases import (
    ACTIVATIONS,
    BACKENDS,
    D,
    adaptformer,
    assert_same_results,
    randn,
    randomize,
    with_parameters,
)
from torch import Tensor, nn

import fastadapters
from fastadapters import (
    BottleneckAdapter,
)

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("layernorm", [None, "in", "out"])
def test_lora_starts_as_the_identity(layernorm: str | None, backend: str) -> None:
    x, other = randn(3, 5, D), randn(3, 5, D, seed=1)
    options = {"layernorm": layernorm, "scale": "learnable", "activation": "gelu"}
    with fastadapters.backend(backend):
        module = BottleneckAdapter(D, 7, **options)
        assert torch.equal(module(x), x)
        assert torch.equal(module(x, other), other)
        module = BottleneckAdapter(D, 7, residual=False, **options)
        assert torch.equal(module(x), torch.zeros_like(x))


def check_std(weight: Tensor, std: float) -> None:
    """Within five standard errors of a normal sample's standard deviation."""
    assert abs(weight.std().item() / std - 1) <= 5 / (2 * weight.numel()) ** 0.5


def test_init_lora() -> None:
    """Kaiming-uniform with a = sqrt(5): all of [-D ** -0.5, D ** -0.5]."""
    module = BottleneckAdapter(256, 64, init="lora")
    down, bound = module.down_proj.weight, 256**-0.5
    assert down.abs().max() <= bound
    check_std(down, bound / 3**0.5)
    assert not module.up_proj.weight.any()


def test_init_houlsby() -> None:
    """Normal of standard deviation 0.01, cut off at two of these."""
    module = BottleneckAdapter(256, 64, init="houlsby")
    inside = math.erf(2**0.5)
    density = math.exp(-2.0) / (2 * math.pi) ** 0.5
    for layer in (module.down_proj, module.up_proj):
        assert layer.weight.abs().max() <= torch.tensor(0.02)
        check_std(layer.weight, 0.01 * (1 - 4 * density / inside) ** 0.5)


def test_init_bert() -> None:
    module = BottleneckAdapter(256, 64, init="bert")
    for layer in (module.down_proj, module.up_proj):
        assert layer.weight.abs().max() > 0.04
        check_std(layer.weight, 0.02)


@pytest.mark.parametrize("init", ["lora", "houlsby", "bert"])
@pytest.mark.parametrize(("scale", "size"), [("learnable", 1), ("channel", D)])
def test_init_of_biases_norm_and_scale(init: str, scale: str, size: int) -> None:
    module = BottleneckAdapter(D, 7, init=init, scale=scale, layernorm="in")
    assert torch.equal(module.scale, torch.ones(size))
    assert torch.equal(module.adapter_layer_norm_before.weight, torch.ones(D))
    for layer in (module.down_proj, module.up_proj, module.adapter_layer_norm_before):
        assert not layer.bias.any()


class Formula(nn.Module):
    """The formula of `BottleneckAdapter` on the parameters of one, written out."""

    def __init__(self, adapter: BottleneckAdapter) -> None:
        super().__init__()
        for name, child in adapter.named_children():
            self.add_module(name, child)
        self.scale = adapter.scale
        self.options = adapter.layernorm, adapter.residual, adapter.activation

    def norm(self, x: Tensor) -> Tensor:
        norm = self.adapter_layer_norm_before
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        return (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias

    def project(self, layer: nn.Linear, x: Tensor) -> Tensor:
        y = x @ layer.weight.T
        return y if layer.bias is None else y + layer.bias

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        layernorm, adds_x, activation = self.options
        z = self.project(self.down_proj, self.norm(x) if layernorm == "in" else x)
        y = self.scale * self.project(self.up_proj, ACTIVATIONS[activation](z))
        y = self.norm(y) if layernorm == "out" else y
        if residual is None and adds_x:
            residual = x
        return y if residual is None else y + residual


# Every value of every option, each layernorm with each residual; True stands for the module's own,
# "other" for one given to forward.
OPTIONS = [
    {"layernorm": layernorm, "residual": residual, "scale": scale, "activation": activation}
    for (layernorm, residual), scale, activation in zip(
        itertools.product((None, "in", "out"), (True, False, "other")),
        itertools.cycle((0.6, "learnable", "channel", "learnable")),
        itertools.cycle(ACTIVATIONS),
        strict=False,
    )
] + [
    {"layernorm": "in", "residual": True, "scale": "channel", "bias": False},
    {"layernorm": "out", "residual": "other", "scale": 0.6, "bias": False},
]


def adapter_and_tensors(
    options: dict[str, Any], shape: tuple[int, ...], r: int
) -> tuple[BottleneckAdapter, dict[str, Tensor]]:
    explicit = options["residual"] == "other"
    adapter = BottleneckAdapter(shape[-1], r, **{**options, "residual": bool(options["residual"])})
    tensors = {"x": randn(*shape)} | ({"residual": randn(*shape, seed=50)} if explicit else {})
    randomize(adapter)
    return adapter, tensors


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_bottleneck_is_its_formula(options: dict[str, Any]) -> None:
    """Output and all gradients in float64."""
    adapter, tensors = adapter_and_tensors(options, (3, 5, D), 7)
    tensors, as_op = with_parameters(adapter, **tensors)
    assert_same_results(as_op(adapter), as_op(Formula(adapter)), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_bottleneck_backends(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """Output and all gradients under the tolerance rule."""
    adapter, tensors = adapter_and_tensors(options, (3, 35, 96), 16)
    tensors, as_op = with_parameters(adapter, **tensors)
    rounded = {name: t.to(dtype) for name, t in tensors.items()}
    check_against_reference(as_op(adapter), rounded, "adapter", backend)


@pytest.mark.parametrize("layernorm", [None, "in", "out"])
@pytest.mark.parametrize("given", [False, True])
def test_call_of_adaptformer(given: bool, layernorm: str | None) -> None:
    """``adaptmlp(x, add_residual=False)`` of the parallel form, and all others."""
    ours = BottleneckAdapter(D, 7, layernorm=layernorm, scale=0.1, init="bert")
    published = adaptformer.Adapter(D, 7, 0.1, layernorm=layernorm)
    published.load_state_dict(ours.state_dict())
    x, residual = randn(3, 5, D), randn(3, 5, D, seed=1) if given else None
    for add in (False, True):
        got = ours(x, residual=residual, add_residual=add)
        torch.testing.assert_close(got, published(x, residual=residual, add_residual=add))
    by_default = ours(x, residual)
    assert torch.equal(by_default, ours(x, residual, True))
    ours.residual = False
    assert torch.equal(ours(x, residual), ours(x, residual, given))


@pytest.mark.parametrize("layernorm", [None, "in", "out"])
@pytest.mark.parametrize("scale", [0.1, "learnable"])
def test_optimizer_of_the_published_module_goes_on(
    scale: float | str, layernorm: str | None
) -> None:
    """Parameters come in the published order, so that AdamW's moments are those of the same."""
    published = adaptformer.Adapter(D, 7, scale, layernorm=layernorm)
    ours = BottleneckAdapter(D, 7, scale=scale, layernorm=layernorm)
    names = [name for name, _ in published.named_parameters()]
    assert [name for name, _ in ours.named_parameters()] == names
    assert [*ours.state_dict()] == [*published.state_dict()]

    def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            module(randn(9, D, seed=step)).square().mean().backward()
            optimizer.step()

    first = torch.optim.AdamW(published.parameters(), lr=0.01)
    train(published, first, range(3))
    ours.load_state_dict(published.state_dict())
    second = torch.optim.AdamW(ours.parameters(), lr=0.01)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(published, first, range(3, 6))
    train(ours, second, range(3, 6))
    for name, p in published.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=1e-4, atol=1e-6)

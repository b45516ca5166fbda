"""Our modules on the layers of a client's adapters: shared, never copied."""

from __future__ import annotations

from typing import Any

import published
import pytest
import torch
from module_cases import randn, randomize
from torch import nn

import fastadapters
from fastadapters import BottleneckAdapter, MultiwayAdapter

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")
D = 24


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("kind", [published.AdaptFormer, published.MultiWay])
@pytest.mark.parametrize("layernorm", ["none", "in", "out"])
@pytest.mark.parametrize("scale", [0.1, "learnable_scalar"])
def test_adaptformer(scale: float | str, layernorm: str, kind: Any, patched: bool) -> None:
    module = randomize(kind(D, 7, scale, layernorm, dropout=0.25)).eval()
    x, residual = randn(3, 5, D), randn(3, 5, D, seed=1)
    calls: list[dict[str, Any]] = [{}, {"add_residual": False}]
    calls += [{"residual": residual, "add_residual": True}, {"add_residual": True}]
    expected = [module(x, **call) for call in calls]
    if patched:
        fastadapters.patch(module)
    ours = BottleneckAdapter.from_module(module)
    assert not ours.training and ours.dropout == 0.25
    for call, want in zip(calls, expected, strict=True):
        torch.testing.assert_close(ours(x, **call), want)
    shared = {id(p) for p in module.parameters()}
    assert {id(p) for p in ours.parameters()} == shared
    assert [*ours.state_dict()] == [*module.state_dict()]
    torch.optim.SGD(ours.parameters(), lr=0.1)
    ours(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_what_is_put_on_a_layer_is_on_both() -> None:
    module = randomize(published.AdaptFormer(D, 7))
    ours = BottleneckAdapter.from_module(module)
    module.down_proj.register_forward_hook(lambda layer, args, y: y + 1)
    torch.testing.assert_close(ours(randn(3, D)), module(randn(3, D)))
    module.scale = 3.0  # a number is no parameter: it is its adapter's own
    assert ours.scale == 0.1


def test_multiway_of_a_published_layer() -> None:
    layer: Any = randomize(published.MultiWayLayer(D, 7, scale=0.6))
    adapters = {"text": layer.adaptmlp_text, "vision": layer.adaptmlp_vision}
    ours = MultiwayAdapter.from_modules(adapters)
    x = randn(3, 5, D)
    torch.testing.assert_close(ours(x, -1), layer.adaptmlp_text(x))
    torch.testing.assert_close(ours(x, 0), layer.adaptmlp_vision(x))
    halves = torch.cat([layer.adaptmlp_text(x[:, :2]), layer.adaptmlp_vision(x[:, 2:])], 1)
    torch.testing.assert_close(ours(x, 2), halves)
    (decision,) = fastadapters.explain(ours, x, 2)
    assert decision.backend != "layers"
    for name, adapter in adapters.items():
        for key, p in adapter.named_parameters():
            assert ours.get_parameter(f"adaptmlp_{name}.{key}") is p


def test_multiway_of_our_own_adapters() -> None:
    first, second = BottleneckAdapter(D, 7), BottleneckAdapter(D, 5)
    ours = MultiwayAdapter.from_modules({"a": first, "b": second})
    assert ours.adaptmlp_a is first and ours.adaptmlp_b is second and ours.modalities == ("a", "b")


def test_errors() -> None:
    tanh = published.AdaptFormer(D, 7)
    tanh.non_linear_func = nn.Tanh()
    known = published.AdaptFormer(D, 7)
    with pytest.raises(ValueError, match=r"module: expected an adapter of AdaptFormer.*Linear"):
        BottleneckAdapter.from_module(nn.Linear(D, D))
    with pytest.raises(ValueError, match=r"module: expected an adapter .*FeedForward"):
        BottleneckAdapter.from_module(published.FeedForward(D, 40))
    with pytest.raises(ValueError, match=r"module: non_linear_func is a .*Tanh: no op has this"):
        BottleneckAdapter.from_module(tanh)
    with pytest.raises(ValueError, match=r"modules\['b'\]: module: non_linear_func"):
        MultiwayAdapter.from_modules({"a": known, "b": tanh})
    with pytest.raises(ValueError, match="modules: expected different names"):
        MultiwayAdapter.from_modules({"a": known})
    known.forward = lambda x: x
    with pytest.raises(ValueError, match="module: its forward is not known"):
        BottleneckAdapter.from_module(known)

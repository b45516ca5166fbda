"""`patch` on adapters of which only a repository has the code: they train as before."""

from __future__ import annotations

from typing import Any

import published
import pytest
import torch
from module_cases import randn
from same_training import assert_trains_the_same
from torch import Tensor, nn

from fastadapters.interop import adaptformer, clip_mma, enhancer
from fastadapters.interop.trees import tree_hash

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")
D = 24


def loss(model: nn.Module) -> Tensor:
    p = next(model.parameters())
    y: Tensor = model(randn(3, 5, D).to(p.dtype))
    return (y - randn(3, 5, D, seed=1).to(p.dtype)).square().mean()


@pytest.mark.parametrize(
    "kind, published_hash",
    [
        (published.AdaptFormer, "a0a51c0b0c2492e1"),
        (published.MultiWay, "a0a51c0b0c2492e1"),
        (published.FeedForward, "70bd1d1ca04d5d9b"),
        (published.MaskedAttention, "8b7eba02b73edf34"),
        (published.MaskedAttentionDownsampled, "8c0f9edbadbb4c45"),
    ],
)
def test_forwards_here_are_the_published_ones(kind: Any, published_hash: str) -> None:
    """The hashes were taken of the files that the docstrings name."""
    assert tree_hash(kind.forward) == published_hash
    clients = [*adaptformer.CLIENTS, *enhancer.CLIENTS, *clip_mma.CLIENTS]
    assert sum(published_hash in client.trees for client in clients) == 1


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("layernorm", ["none", "in", "out"])
@pytest.mark.parametrize("scale", [0.1, "learnable_scalar"])
def test_adaptformer(scale: float | str, layernorm: str, parallel: bool) -> None:
    options = {"scale": scale, "layernorm": layernorm, "parallel": parallel}
    model = nn.Sequential(*(published.Layer(D, 7, **options) for _ in range(2)))
    report = assert_trains_the_same(model, loss)
    assert report.replaced == {"0.adaptmlp": "adaptformer", "1.adaptmlp": "adaptformer"}
    assert not report.skipped


@pytest.mark.parametrize("split", [-1, 0])
def test_multiway_adapter(split: int) -> None:
    model = nn.Sequential(published.MultiWayLayer(D, 7, split, scale=0.6))
    report = assert_trains_the_same(model, loss)
    assert report.replaced == {
        "0.adaptmlp_text": "adaptformer",
        "0.adaptmlp_vision": "adaptformer",
        "0.enhancemlp": "torchscale",
    }
    assert report.skipped == {"0.ffn": "subln: no op has a LayerNorm between the projections"}


@pytest.mark.parametrize("activation", [nn.functional.relu, nn.functional.gelu, nn.functional.silu])
def test_enhancer(activation: Any) -> None:
    report = assert_trains_the_same(published.FeedForward(D, 40, activation), loss)
    assert report.replaced == {"": "torchscale"}


@pytest.mark.parametrize("downsampled", [True, False])
def test_clip_mma(downsampled: bool) -> None:
    adapter: nn.Module = published.MaskedAttention(D)
    if downsampled:
        adapter = published.MaskedAttentionDownsampled(D, 16)
    model = published.Head(adapter, randn(6, D, seed=2))

    def cross_entropy(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        head: Any = model
        head.adapter._attn_mask = head.adapter._init_attn_mask(6, 1).to(dtype)
        logits = model(randn(4, D, seed=3).to(dtype))
        return nn.functional.cross_entropy(logits, torch.tensor([0, 5, 3, 3]))

    report = assert_trains_the_same(model, cross_entropy)
    assert report.replaced == {"adapter": "clip-mma"}

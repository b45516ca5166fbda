"""`patch` on torchscale's FeedForwardNetwork, MultiWay-Adapter's Alignment Enhancer."""

from __future__ import annotations

import pytest
import torch
from same_training import assert_trains_the_same
from torch import Tensor, nn
from torchscale.component.feedforward_network import FeedForwardNetwork

import fastadapters

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")
D = 24


def network(activation: str = "gelu", dropout: float = 0.0, subln: bool = False) -> nn.Module:
    made: nn.Module = FeedForwardNetwork(D, 40, activation, dropout, 0.0, 1e-5, subln)
    return made


def loss(model: nn.Module) -> Tensor:
    x = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0))
    return (model(x.to(next(model.parameters()).dtype)) - 1).square().mean()


@pytest.mark.parametrize("activation", ["relu", "gelu", "swish"])
def test_trains_the_same(activation: str) -> None:
    assert assert_trains_the_same(network(activation), loss).replaced == {"": "torchscale"}


def test_subln_is_skipped() -> None:
    with pytest.warns(UserWarning, match="no op has a LayerNorm between the projections"):
        fastadapters.patch(network(subln=True))


def test_dropout_on_the_output_is_the_clients() -> None:
    model = network(dropout=0.5).train()
    x = torch.randn(3, 5, D)
    torch.manual_seed(1)
    expected = model(x)
    fastadapters.patch(model)
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), expected)

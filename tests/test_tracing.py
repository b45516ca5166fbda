"""The functional ops in what traces: torch.fx has them as leaves, torch.compile for any split."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from multimodal_cases import arguments as head_arguments
from multimodal_cases import head_tensors
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastadapters
from fastadapters import MultiwayAdapter, backends
from fastadapters.functional import (
    BottleneckParameters,
    bottleneck,
    cross_modal_attention,
    multimodal_features,
    multimodal_logits,
    multiway_bottleneck,
    sequence_fusion,
)

BACKENDS = ["eager"] + [name for name in ("cpu",) if backends.unavailable(name) is None]


class Model(nn.Module):
    """A model that calls every op."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(3, 8))
        self.up = nn.Parameter(torch.randn(8, 3))
        self.time = nn.Parameter(torch.randn(1, 6, 3))
        self.head = head_arguments(head_tensors(5, 4, 8, 8, 4, torch.float32))

    def forward(self, x, image):  # torch.fx cannot pickle postponed annotations
        side = BottleneckParameters(self.down, self.up, scale=0.5)
        y = bottleneck(x, self.down, self.up, activation="gelu", residual=x)
        y = multiway_bottleneck(y, 2, side, side, residual=y)
        q = y.unflatten(-1, (2, 4))[:, :1]
        both = cross_modal_attention(q, q, q, q, q, q)
        y = sequence_fusion([y], [self.down], [None], [self.time], [self.up.T[None]])
        text, _, layers = self.head
        new_text, new_image = multimodal_features(text, image, layers, num_heads=2)
        logits = multimodal_logits(text, image, layers, num_heads=2, logit_scale=3.0)
        return y, both[0], new_text, new_image, logits


OPS = {
    bottleneck, multiway_bottleneck, cross_modal_attention, sequence_fusion, multimodal_features,
    multimodal_logits,
}  # fmt: skip


def test_fx_has_the_ops_as_leaves() -> None:
    model, x, image = Model(), torch.randn(2, 6, 8), torch.randn(4, 8)
    traced = fx.symbolic_trace(model)
    called = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert called >= OPS
    torch.testing.assert_close(traced(x, image), model(x, image))
    for copied in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        torch.testing.assert_close(copied(x, image), model(x, image))
    traced(x, image)[0].sum().backward()
    assert traced.down.grad.abs().sum() > 0


def test_fx_traces_of_one_op_need_no_shapes() -> None:
    """What is a Proxy has no shape to check; what the graph is run on has."""
    traced = fx.symbolic_trace(lambda x, w: bottleneck(x, w, w.T))
    w = torch.randn(3, 8)
    for x in (torch.randn(8), torch.randn(4, 8), torch.randn(2, 3, 8)):
        assert torch.equal(traced(x, w), bottleneck(x, w, w.T))
    with pytest.raises(ValueError, match=r"down_weight: expected \[r, D_in\]"):
        traced(torch.randn(4, 9), w)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BACKENDS)
def test_one_compilation_serves_every_split(name: str, training: bool) -> None:
    """Two compilations for splits inside (0, T), as for any number; the ends add theirs."""
    torch._dynamo.reset()
    module = MultiwayAdapter(16, 4)
    for p in module.parameters():
        p.data.normal_()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    x = torch.randn(2, 23, 16)

    def results(call: nn.Module, split: int) -> list[Tensor]:
        y = call(x, split)
        if not training:
            return [y]
        return [
            y,
            *torch.autograd.grad(y.square().sum(), [*module.parameters()], allow_unused=True),
        ]

    with fastadapters.backend(name), torch.set_grad_enabled(training):
        for split in (5, 7, 11, 2, 21, 13, 8, 3, 19, 17, 6, 9):
            for got, expected in zip(results(compiled, split), results(module, split), strict=True):
                torch.testing.assert_close(got, expected)
        assert counter.frame_count <= 2
        for split in (-1, 0, 23):
            torch.testing.assert_close(results(compiled, split)[0], results(module, split)[0])
        assert counter.frame_count <= 5
    torch._dynamo.reset()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the compiled library")
def test_one_compilation_serves_all_boundaries() -> None:
    """Two for three modalities, parts of one token included."""
    torch._dynamo.reset()
    module = MultiwayAdapter(16, 4, modalities=("a", "b", "c"))
    for p in module.parameters():
        p.data.normal_()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    x = torch.randn(2, 23, 16)
    for splits in ((5, 9), (7, 12), (2, 20), (3, 4), (1, 2), (10, 22)):
        torch.testing.assert_close(compiled(x, splits=splits), module(x, splits=splits))
    assert counter.frame_count <= 2
    torch._dynamo.reset()

"""The modules under torch.compile, torch.export, torch.jit.trace and torch.fx."""

from __future__ import annotations

import io

import pytest
import torch
import torch.fx
from module_cases import assert_exact, every_module, inputs, sample
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastadapters

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")


class Around(nn.Module):
    """A model with the adapter in it, and something behind."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.adapter = sample(kind, dtype)
        self.head = nn.Linear(24, 3, dtype=dtype)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        adapter = self.adapter
        if isinstance(adapter, fastadapters.MultiwayAdapter):
            y = adapter(x, 2)
        elif isinstance(adapter, fastadapters.WanderAdapter):
            y = adapter([x, other])
        elif isinstance(adapter, fastadapters.MultiModalAdapter):
            texts, images = adapter(x, other)
            y = texts + images[:, None]
        else:
            y = adapter(x)
        z: Tensor = self.head(y)
        return z


def around(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Around, list[Tensor]]:
    tensors = inputs(kind, dtype)
    return Around(kind, dtype), tensors if len(tensors) == 2 else tensors * 2


@every_module
def test_fx_has_a_module_as_one_node(kind: str) -> None:
    model, tensors = around(kind)
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["adapter", "head"]
    assert torch.equal(traced(*tensors), model(*tensors))


@pytest.mark.parametrize("kind", ["bottleneck", "enhancer"])
def test_fx_of_the_module_itself(kind: str) -> None:
    module, tensors = sample(kind, torch.float64), inputs(kind, torch.float64)
    options = {"residual": None, "add_residual": None} if kind == "bottleneck" else None
    traced = torch.fx.symbolic_trace(module, concrete_args=options)
    assert_exact(traced(*tensors), module(*tensors))


@every_module
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace(kind: str, trains: bool) -> None:
    """In plain PyTorch, so that the program runs anywhere; gradients included."""
    model, tensors = around(kind, torch.float64)
    model.requires_grad_(trains)
    with torch.set_grad_enabled(trains):
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.trace(model, tensors), buffer)
    buffer.seek(0)
    traced = torch.jit.load(buffer)
    got, expected = traced(*tensors), model(*tensors)
    assert_exact(got, expected)
    assert got.requires_grad == trains
    if trains:
        names = {name: p for name, p in model.named_parameters()}
        want = dict(zip(names, torch.autograd.grad(expected.sum(), names.values()), strict=True))
        parameters = dict(traced.named_parameters())
        grads = torch.autograd.grad(got.sum(), [parameters[name] for name in names])
        for (name, grad), g in zip(want.items(), grads, strict=True):
            torch.testing.assert_close(g, grad, msg=name)


@every_module
def test_compile(kind: str) -> None:
    """One graph, and with it the op where there is a kernel, not the layers."""
    model, tensors = around(kind)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), model(*tensors))
    compiled(*tensors)
    assert counter.frame_count == 1
    if kind in ("bottleneck", "enhancer", "multiway"):
        kernel = fastadapters.backends.unavailable("cpu") is None
        nodes = {str(node.target) for node in counter.graphs[0].graph.nodes}
        assert any("fastadapters" in name for name in nodes) == kernel


@every_module
@pytest.mark.parametrize("strict", [True, False])
def test_export(kind: str, strict: bool) -> None:
    model, tensors = around(kind)
    with torch.no_grad():
        program = torch.export.export(model, tuple(tensors), strict=strict).module()
        torch.testing.assert_close(program(*tensors), model(*tensors))


@every_module
def test_compiled_hooks_on_layers(kind: str) -> None:
    model, tensors = around(kind)
    layer = next(m for m in model.adapter.modules() if isinstance(m, nn.Linear))
    before = model(*tensors)
    layer.register_forward_hook(lambda m, args, y: 2 * y)
    torch._dynamo.reset()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(*tensors)
    torch.testing.assert_close(got, model(*tensors))
    assert not torch.allclose(got, before)


def test_export_of_the_attention_for_any_number_of_images() -> None:
    model, (text, image) = sample("multimodal").eval(), inputs("multimodal")
    sizes = ({}, {0: torch.export.Dim("B", min=2, max=64)})
    program = torch.export.export(model, (text, image), dynamic_shapes=sizes).module()
    images = torch.cat([image, image])
    torch.testing.assert_close(program(text, images), model(text, images))

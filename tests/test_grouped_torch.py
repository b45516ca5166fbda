"""The grouped op inside PyTorch: opcheck, compile, export, checkpoint, FLOPs, torch.func."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from bottleneck_cases import Case, op_arguments
from grouped_cases import index_of, inputs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastadapters
from fastadapters import GroupedAdapter, backends
from fastadapters.functional import grouped_bottleneck

pytestmark = pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason="needs the compiled library"
)
ops = torch.ops.fastadapters


def test_opcheck() -> None:
    case = Case(rows=(4, 9), d=20, r=6, norm="both", scale="channel", dropout=0.25)
    arguments = partial(op_arguments, case, inputs(case))
    index = index_of(case)
    torch.library.opcheck(ops.grouped_forward.default, (*arguments(True, index), True))
    torch.library.opcheck(ops.grouped_forward.default, (*arguments(False, index), False))
    x, residual, *rest = arguments(False, index)
    y, z, stats = ops.grouped_forward(x, residual, *rest, True)
    for needs in (0b11111111, 0b1010):
        torch.library.opcheck(
            ops.grouped_backward.default, (torch.randn_like(y), x, z, stats, *rest, needs)
        )


def call(x: Tensor, index: Tensor, stacks: dict[str, Tensor]) -> Tensor:
    return grouped_bottleneck(x, index, **stacks, residual=x, activation="gelu")


def sample(requires_grad: bool = True) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    case = Case(rows=(4, 9), d=32, r=8, norm="both", scale="channel")
    tensors = inputs(case)
    tensors.pop("cotangent")
    leaves = {name: t.requires_grad_(requires_grad) for name, t in tensors.items()}
    return leaves.pop("x"), index_of(case), leaves


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_compile_in_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    x, index, stacks = sample()
    leaves = [x, *stacks.values()]
    with fastadapters.backend(backend):
        results = [
            (y, *torch.autograd.grad(y.square().sum(), leaves))
            for y in (fn(x, index, stacks) for fn in (compiled, call))
        ]
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
        compiled(x, index.flip(0), stacks)
    assert counter.frame_count == 1


def test_compiled_code_looks_at_the_index_too() -> None:
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    x, _, stacks = sample()
    with pytest.raises(ValueError, match=r"index: expected values in \[0, 4\), got 7"):
        compiled(x, torch.tensor([0, 7, 1, 1]), stacks)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool, tmp_path: Path) -> None:
    """The op for any number of items; a program that was saved and loaded looks at the index and
    trains."""
    adapters = GroupedAdapter(32, 8, ["a", "b", "c"], layernorm="in", scale="channel")
    x, index = torch.randn(4, 9, 32), torch.tensor([2, 0, 2, 1])
    items = torch.export.Dim("B", min=2)
    exported = torch.export.export(
        adapters, (x, index), dynamic_shapes=({0: items}, {0: items}), strict=strict
    )
    assert ops.grouped_forward.default in {node.target for node in exported.graph.nodes}
    torch.export.save(exported, tmp_path / "adapters.pt2")
    program = torch.export.load(tmp_path / "adapters.pt2").module()
    x, index = torch.randn(7, 9, 32), torch.tensor([0, 0, 1, 2, 1, 0, 2])
    torch.testing.assert_close(program(x, index), adapters(x, index))
    with pytest.raises(ValueError, match=r"index: expected values in \[0, 3\), got 3"):
        program(x, index + 1)
    for module in (program, adapters):
        module(x, index).square().sum().backward()
    for name, p in adapters.named_parameters():
        torch.testing.assert_close(program.get_parameter(name).grad, p.grad, msg=name)


def test_checkpoint_draws_the_same_mask() -> None:
    x, index, stacks = sample()

    def dropped(x: Tensor) -> Tensor:
        return grouped_bottleneck(x, index, **stacks, dropout=0.5, training=True)

    results = []
    for fn in (dropped, lambda x: checkpoint(dropped, x, use_reentrant=False)):
        torch.manual_seed(0)
        y = fn(x)
        results.append((y, *torch.autograd.grad(y.sum(), [x, *stacks.values()])))
    assert all(map(torch.equal, *results))


def test_flops_are_those_of_one_adapter() -> None:
    x, index, stacks = sample()
    with FlopCounterMode(display=False) as counter:
        grouped_bottleneck(x, index, **stacks).sum().backward()
    m, d, r = 36, 32, 8
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert counts == {
        "fastadapters.grouped_forward": 4 * m * d * r,
        "fastadapters.grouped_backward": 8 * m * d * r,
    }


def test_gradients_of_each_sample_by_vmap() -> None:
    x, index, stacks = sample(requires_grad=False)

    def loss(stacks: dict[str, Tensor], x: Tensor, index: Tensor) -> Tensor:
        return call(x.unsqueeze(0), index.unsqueeze(0), stacks).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(stacks, x, index)
    for i, n in enumerate(index.tolist()):
        alone = torch.func.grad(loss)(stacks, x[i], index[i])
        torch.testing.assert_close(each["down_weight"][i], alone["down_weight"])
        assert each["up_bias"][i].ne(0).any(1).nonzero().flatten().tolist() == [n]


def test_double_backward_by_the_reference() -> None:
    x, index, stacks = sample()
    doubles = {name: t.detach().double().requires_grad_() for name, t in stacks.items()}
    leaves = (x.detach().double().requires_grad_(), *doubles.values())

    def fn(x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(doubles, values, strict=True))
        return grouped_bottleneck(x, index, **given, activation="silu")[..., :2]

    with fastadapters.backend("eager"):
        assert torch.autograd.gradcheck(fn, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(fn, leaves, fast_mode=True)

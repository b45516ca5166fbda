"""The grouped op inside PyTorch: opcheck, compile, export, checkpoint, FLOPs, torch.func."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bottleneck_cases import Case
from grouped_cases import index_of, inputs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastadapters
from fastadapters import backends
from fastadapters.functional import grouped_bottleneck
from fastadapters.ops.bottleneck import PARAMETERS
from fastadapters.ops.codes import ACTIVATION_CODES, DTYPE_CODES

pytestmark = pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason="needs the compiled library"
)
ops = torch.ops.fastadapters


def op_arguments(case: Case, requires_grad: bool) -> tuple[Any, ...]:
    """The positional arguments of grouped_forward up to ``add_x``, for a sample."""
    tensors = inputs(case)
    for name, t in tensors.items():
        tensors[name] = t.detach().requires_grad_(requires_grad and name != "cotangent")
    return (
        tensors["x"] if case.layout != "strided" else tensors["x"].contiguous(),
        None if "residual" not in tensors else tensors["residual"].contiguous(),
        *(tensors.get(name) for name in PARAMETERS),
        torch.tensor([1, 2]) if case.dropout + case.input_dropout > 0 else None,
        index_of(case),
        0.6 if case.scale == "number" else 1.0,
        1e-5,
        case.dropout,
        case.input_dropout,
        ACTIVATION_CODES[case.activation],
        DTYPE_CODES[case.dtype],
        DTYPE_CODES[case.out_dtype],
        case.residual == "x",
    )


def test_opcheck() -> None:
    case = Case(rows=(4, 9), d=20, r=6, norm="both", scale="channel", dropout=0.25)
    torch.library.opcheck(ops.grouped_forward.default, (*op_arguments(case, True), True))
    torch.library.opcheck(ops.grouped_forward.default, (*op_arguments(case, False), False))
    x, residual, *rest = op_arguments(case, False)
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


def test_export() -> None:
    x, index, stacks = sample(requires_grad=False)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return call(x, index, stacks)

    program = torch.export.export(Module(), (x, index))
    torch.testing.assert_close(program.module()(x, index), call(x, index, stacks))


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

"""Sequence fusion inside PyTorch: opcheck, compile, export, autocast, checkpoint, memory, FLOPs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from against_reference import Tensors, check_against_reference, check_compiled
from test_sequence_fusion import GROUPS, fuse, sample
from test_torch import peak_allocation
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastadapters
from fastadapters import WanderAdapter, backends, functional

pytestmark = pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason="needs the compiled library"
)
ops = torch.ops.fastadapters


def arguments(requires_grad: bool, lengths: bool = False) -> tuple[list[Any], tuple[Any, ...]]:
    """(inputs, residual, the parameters' lists) and (lengths and the options)."""
    tensors = sample((5, 9), (12, 12), batch=2, width=6, out_len=3, out_dim=12, rank=2)
    for t in tensors.values():
        t.requires_grad_(requires_grad)
    lists = [[tensors[f"{group} {i}"] for i in range(2)] for group in GROUPS]
    counts = torch.tensor([[5, 2], [0, 9]]) if lengths else None
    return [lists[0], tensors["residual"], *lists[1:]], (counts, 2, 0, 0, False, False)


@pytest.mark.parametrize("lengths", [False, True])
def test_opcheck_forward(lengths: bool) -> None:
    for save in (True, False):
        tensors, options = arguments(save, lengths)
        torch.library.opcheck(ops.sequence_fusion_forward.default, (*tensors, *options, save))


@pytest.mark.parametrize("needs", [0b1111111111, 0b1, 0b1000000100])
def test_opcheck_backward(needs: int) -> None:
    (inputs, residual, *parameters), options = arguments(False, True)
    y, *saved = ops.sequence_fusion_forward(inputs, residual, *parameters, *options, True)
    torch.library.opcheck(
        ops.sequence_fusion_backward.default,
        (torch.randn_like(y), inputs, *saved, *parameters, *options, needs),
    )


def test_compile() -> None:
    """One graph and two compilations over five batch sizes, on the kernel."""
    decisions = fastadapters.explain(fuse, sample(rank=2))
    assert [d.backend for d in decisions] == ["cpu"]
    check_compiled(fuse, [sample(batch=b, rank=2) for b in (5, 8, 3, 16, 2)])


def test_export() -> None:
    module = WanderAdapter(12, (5, 9), 4, feature_rank=2, time_rank=3).eval()
    xs = [torch.randn(3, 5, 12), torch.randn(3, 9, 12)]
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (xs,), dynamic_shapes=([{0: batch}, {0: batch}],))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert ops.sequence_fusion_forward.default in targets
    more = [torch.randn(7, 5, 12), torch.randn(7, 9, 12)]
    torch.testing.assert_close(program.module()(more), module(more))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """float32 tensors, 16-bit products; a float32 residual makes a float32 result."""
    for residual, expected in ((True, torch.float32), (False, dtype)):
        tensors = sample(rank=2, residual=residual)
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        results = []
        for backend in ("cpu", "eager"):
            with torch.autocast("cpu", dtype), fastadapters.backend(backend):
                y = fuse(leaves)
            assert y.dtype == expected
            results.append((y, *torch.autograd.grad(y.float().square().sum(), leaves.values())))
        for ours, theirs in zip(*results, strict=True):
            assert ours.dtype == theirs.dtype
            size = theirs.abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=0.0, atol=0.05 * size)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    module = WanderAdapter(12, (5, 9), 4, feature_rank=2, time_rank=3)
    xs = [torch.randn(3, t, 12, requires_grad=True) for t in (5, 9)]
    leaves = [*xs, *module.parameters()]
    expected = torch.autograd.grad(module(xs).square().sum(), leaves)

    def call(*inputs: Tensor) -> Tensor:
        y: Tensor = module(list(inputs))
        return y

    for leaf in leaves:
        leaf.grad = None
    checkpoint(call, *xs, use_reentrant=use_reentrant).square().sum().backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_double_backward_raises() -> None:
    tensors = {name: t.requires_grad_() for name, t in sample().items()}
    with fastadapters.backend("cpu"):
        (gradient,) = torch.autograd.grad(
            fuse(tensors).square().sum(), tensors["x 0"], create_graph=True
        )
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            gradient.sum().backward()


def test_batched_gradients() -> None:
    """One result for each of several cotangents, by both kinds of batched tensors PyTorch has."""
    leaves = {name: t.requires_grad_() for name, t in sample(rank=2).items()}
    with fastadapters.backend("cpu"):
        y = fuse(leaves)
    cotangents = torch.randn(3, *y.shape)

    def gradients(dy: Tensor, batched: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            y, [*leaves.values()], dy, retain_graph=True, is_grads_batched=batched
        )

    expected = map(torch.stack, zip(*map(gradients, cotangents), strict=True))
    found = gradients(cotangents, True), torch.func.vmap(gradients)(cotangents)
    for gradient, *others in zip(expected, *found, strict=True):
        assert all(torch.equal(other, gradient) for other in others)


def saved_bytes(tensors: Tensors, trained: tuple[str, ...]) -> int:
    """Bytes kept for backward beside the parameters where those named so want a gradient."""
    leaves = {name: t.requires_grad_(name.split()[0] in trained) for name, t in tensors.items()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), fastadapters.backend("cpu"):
        y = fuse(leaves)
    y.sum().backward()
    parameters = {t.data_ptr() for name, t in leaves.items() if not name.startswith("x ")}
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


def test_saved_memory() -> None:
    """P and z; x only where a gradient reads it; never an expanded [B, T, D]."""
    sizes = {"lengths": (50, 30), "dims": (64, 64), "out_dim": 64, "residual": False}
    tensors = sample(**sizes)
    x = sum(4 * math.prod(tensors[f"x {i}"].shape) for i in range(2))
    z, products = 4 * 3 * 80 * 8, 4 * 2 * 3 * 8 * 8
    everything = ("x", *GROUPS[1:])
    assert saved_bytes(tensors, everything) == x + z + products
    assert saved_bytes(tensors, ("x", "time_factor", "feature_factor")) == z + products
    assert saved_bytes(tensors, ("down_bias",)) == z + products


@pytest.mark.parametrize("frozen", [False, True])
def test_peak_memory(frozen: bool) -> None:
    """A step takes under a third of the published one's beside the gradients that both return."""
    sizes = {"lengths": (64, 100), "dims": (256, 256), "out_dim": 256, "batch": 8, "width": 16}
    tensors = sample(**sizes, out_len=16, residual=False)  # type: ignore[arg-type]
    leaves = {n: t.requires_grad_(n[0] != "x" or not frozen) for n, t in tensors.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]
    returned = sum(t.nbytes for t in wanted)

    def step() -> None:
        y = fuse(leaves, residual="leading")
        torch.autograd.grad(y, wanted, cotangent)

    cotangent = torch.randn(8, 16, 256)
    peaks = []
    for backend in ("cpu", "reference"):
        with fastadapters.backend(backend):
            step()
            peaks.append(peak_allocation(step) - returned)
    assert 3 * peaks[0] <= peaks[1]


def test_flops() -> None:
    """As PyTorch counts the same products in the eager form; backward makes F again."""
    tensors = {
        name: t.requires_grad_() for name, t in sample((40, 30), (32, 32), residual=False).items()
    }
    counts = []
    for backend in ("cpu", "eager"):
        with fastadapters.backend(backend):
            with FlopCounterMode(display=False) as forward:
                y = fuse(tensors)
            with FlopCounterMode(display=False) as backward:
                y.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    factors = 2 * 2 * 3 * 8 * 8 * 32
    assert counts[0] == (counts[1][0], counts[1][1] + factors)


@pytest.mark.parametrize("rank", [1, 4])
def test_low_rank_multimodal_fusion(rank: int) -> None:
    """LMF (Liu et al., 2018) is the case T = 1, T_o = 1: sum_q w_q prod_m [h_m 1] U_mq."""
    gen = torch.Generator().manual_seed(0)
    sizes, hidden, out, batch = (10, 4, 6), 7, 5, 9
    xs = [torch.randn(batch, d, generator=gen) for d in sizes]
    encoders = [nn.Linear(d, hidden) for d in sizes]
    factors = [torch.randn(rank, hidden + 1, out, generator=gen) for _ in sizes]
    weights, constant = torch.randn(rank, generator=gen), torch.randn(out, generator=gen)
    expected: Any = constant
    for q in range(rank):
        product: Any = weights[q]
        for x, encoder, factor in zip(xs, encoders, factors, strict=True):
            h = torch.cat([torch.relu(encoder(x)), torch.ones(batch, 1)], dim=1)
            product = product * (h @ factor[q])
        expected = expected + product
    # The 1 behind h is one more row of the down-projection: a weight of 0 and a bias of 1.
    with torch.no_grad():
        ours = {}
        for i, (x, encoder, factor) in enumerate(zip(xs, encoders, factors, strict=True)):
            ours |= {
                f"x {i}": x[:, None],
                f"down_weight {i}": torch.cat([encoder.weight, torch.zeros(1, sizes[i])]),
                f"down_bias {i}": torch.cat([encoder.bias, torch.ones(1)]),
                f"time_factor {i}": (weights if i == 0 else torch.ones(rank))[:, None, None],
                f"feature_factor {i}": factor,
            }
        ours["residual"] = constant.expand(batch, 1, out)
    for backend in ("reference", "eager", "cpu"):
        with fastadapters.backend(backend):
            y = fuse(ours, activation="relu")
        torch.testing.assert_close(y[:, 0], expected, rtol=1e-5, atol=1e-5)
    check_against_reference(lambda t: fuse(t, activation="gelu"), ours, "LMF", backend="cpu")


def test_bad_lengths() -> None:
    tensors = sample((5, 9), (32, 32))
    for lengths, error, message in (
        (torch.ones(2, 2, dtype=torch.int64), ValueError, "lengths: expected [M, B] = [2, 3]"),
        ([None], ValueError, "lengths: expected M = 2 tensors or None, got 1"),
        (torch.ones(2, 3), TypeError, "lengths: expected a tensor [M, B] of integers"),
        ([torch.ones(3), None], TypeError, "lengths[0]: expected a tensor [B] of integers"),
    ):
        with pytest.raises(error) as raised:
            fuse(tensors, lengths=lengths)
        assert message in str(raised.value)


def test_bad_leading_residual() -> None:
    tensors = sample((5, 9), (32, 16), residual=False)
    with pytest.raises(ValueError, match=r"inputs\[1\]: expected .* of a leading residual"):
        fuse(tensors, residual="leading")
    with pytest.raises(ValueError, match="residual: expected T_o = 8 tokens to lead, got 5"):
        fuse(sample((5,), residual=False, dims=(32,)), residual="leading")
    with pytest.raises(ValueError, match="residual: expected one of leading, got 'first'"):
        fuse(tensors, residual="first")
    with pytest.raises(ValueError, match="fusion: expected one of cp, summed, got 'sum'"):
        functional.sequence_fusion(*([tensors[f"{group} 0"]] for group in GROUPS), fusion="sum")

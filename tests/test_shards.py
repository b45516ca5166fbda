"""The ops on DTensors of two gloo processes: on each one's shards where that is the op, or not."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map_only

import fastadapters
from fastadapters import backends
from fastadapters import functional as F

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

# Three items: of two processes one has two of them.
B, T, D, R = 3, 5, 12, 4
FUSED = "cpu" if backends.unavailable("cpu") is None else "eager"
ROWS = Shard(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape).mul_(0.5).requires_grad_()


def adapter() -> F.BottleneckParameters:
    return F.BottleneckParameters(
        draw(R, D), draw(D, R), draw(R), draw(D), draw(1), draw(D), draw(D)
    )


def layers(*sizes: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    return [(draw(n_out, n_in), draw(n_out)) for n_in, n_out in sizes]


def head() -> dict[str, Any]:
    e = 8
    return {
        "layers": F.MultiModalLayers(
            layers((D, e)), layers((e, 3 * e))[0], layers((e, e))[0], layers((e, R), (R, D))
        ),
        "num_heads": 2,
    }  # fmt: skip


# op, rows that are sharded in this dimension, other arguments
def calls() -> list[tuple[Callable[..., Any], int, dict[str, Any], dict[str, Any]]]:
    x, tokens = draw(B, T, D), draw(B, 2, 2, 6)
    sequences = [draw(B, T, D), draw(B, 3, D)]
    fusion = {
        "down_weights": [draw(R, D), draw(R, D)], "down_biases": [draw(R), None],
        "time_factors": [draw(2, T, 4), draw(2, 3, 4)],
        "feature_factors": [draw(2, R, D), draw(2, R, D)],
    }  # fmt: skip
    lengths = [torch.tensor([5, 2, 0]), torch.tensor([1, 3, 2])]
    images = {"image_q": tokens, "image_k": draw(B, 2, 2, 6), "image_v": draw(B, 2, 2, 6)}
    text = {f"text_{name}": draw(3, 2, 6) for name in "qkv"}
    own_text = {f"text_{name}": draw(B, 3, 2, 6) for name in "qkv"}
    return [
        (F.bottleneck, 0, {"x": x, "residual": draw(B, T, D)}, adapter()._asdict()),
        (F.bottleneck, 1, {"x": x, "residual": x}, adapter()._asdict()),
        (
            F.multiway_bottleneck, 0, {"x": x, "residual": x},
            {"split": 2, "first": adapter(), "second": adapter()},
        ),
        (
            F.grouped_bottleneck, 0, {"x": x, "index": torch.tensor([1, 0, 1]), "residual": x},
            {"down_weight": draw(2, R, D), "up_weight": draw(2, D, R), "scale": draw(2)},
        ),
        (F.sequence_fusion, 0, {"inputs": sequences, "residual": draw(B, 4, D)}, fusion),
        (
            F.sequence_fusion, 0, {"inputs": sequences, "lengths": lengths},
            fusion | {"residual": "leading"},
        ),
        (F.cross_modal_attention, 0, images, text | {"bias": ((0.0, 1.0), (1.0, 0.0))}),
        (F.cross_modal_attention, 0, images | own_text, {"outputs": "image"}),
        (F.multimodal_features, 0, {"image": draw(B, D)}, head() | {"text": draw(4, D)}),
        (
            F.multimodal_logits, 0, {"image": draw(B, D)},
            head() | {"text": draw(4, D), "logit_scale": draw(1), "adapt": "image"},
        ),
    ]  # fmt: skip


def loss(result: Any) -> Tensor:
    """Not symmetric in the items."""
    outs = result if isinstance(result, tuple) else (result,)
    total = sum((y.square() * y.sum(-1, keepdim=True).sigmoid()).sum() for y in outs)
    assert isinstance(total, Tensor)
    return total


def gradients(result: Any, arguments: Any) -> list[Tensor]:
    leaves = [t for t in tree_leaves(arguments) if isinstance(t, Tensor) and t.requires_grad]
    given = torch.autograd.grad(loss(result), leaves, allow_unused=True)
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in given if t is not None]


def check_calls(mesh: dist.device_mesh.DeviceMesh) -> None:
    """Results and gradients are those of one process, by the kernels."""

    def place(placement: Placement) -> Callable[[Tensor], Tensor]:
        return lambda t: distribute_tensor(t.detach(), mesh, [placement]).requires_grad_(
            t.requires_grad
        )

    for op, dim, rows, shared in calls():
        whole = op(**rows, **shared)
        done: dict[int, Tensor] = {}

        def once(t: Tensor, dim: int = dim, done: dict[int, Tensor] = done) -> Tensor:
            return done.setdefault(id(t), place(Shard(dim))(t))

        sharded = tree_map_only(Tensor, once, rows)
        replicated = tree_map_only(Tensor, place(Replicate()), shared)
        decisions = fastadapters.explain(op, **sharded, **replicated)
        assert {d.backend for d in decisions} == {FUSED}, (op.__name__, decisions)
        result = op(**sharded, **replicated)
        for y, expected in zip(tree_leaves(result), tree_leaves(whole), strict=True):
            assert y.placements == (Shard(dim),)
            assert y.shape == expected.shape
            assert_close(y.full_tensor(), expected, rtol=1e-5, atol=1e-5)
        expected_gradients = gradients(whole, (rows, shared))
        for g, expected in zip(
            gradients(result, (sharded, replicated)), expected_gradients, strict=True
        ):
            atol = 1e-5 * float(expected.abs().max())  # sums over items cancel
            assert_close(g, expected, rtol=1e-5, atol=atol)


def check_refusals(mesh: dist.device_mesh.DeviceMesh) -> None:
    """Layouts without a rule run in plain PyTorch, as DTensor has it, and `explain` says why."""
    x, weights = torch.randn(4, D), (torch.randn(R, D), torch.randn(D, R))

    def on_mesh(t: Tensor, placement: Placement) -> DTensor:
        return distribute_tensor(t, mesh, [placement])

    whole = tuple(on_mesh(w, Replicate()) for w in weights)
    of_width = (on_mesh(weights[0], Shard(0)), on_mesh(weights[1], Shard(1)))
    expected = F.bottleneck(x, *weights)
    for rows, parameters, reason in (
        (on_mesh(x, Shard(1)), whole, "dimension 1 of 2 of the activations is sharded"),
        (on_mesh(x, Replicate()), of_width, "down_weight is sharded"),
    ):
        (decision,) = fastadapters.explain(F.bottleneck, rows, *parameters)
        assert decision.backend == "reference"
        assert reason in decision.reason
        y = F.bottleneck(rows, *parameters)
        assert isinstance(y, DTensor)
        assert_close(y.full_tensor(), expected)
    if FUSED != "eager":
        with fastadapters.backend(FUSED), pytest.raises(RuntimeError, match="down_weight is sh"):
            F.bottleneck(on_mesh(x, Replicate()), *of_width)


def check_dropout(mesh: dist.device_mesh.DeviceMesh) -> None:
    """Processes whose generators are in the same state drop different elements."""
    x, weights = torch.ones(2, 64), (torch.eye(64), torch.eye(64))
    placed = [distribute_tensor(w, mesh, [Replicate()]) for w in weights]
    torch.manual_seed(7)
    rows = distribute_tensor(x, mesh, [ROWS])
    y = F.bottleneck(rows, *placed, dropout=0.5, training=True)
    assert isinstance(y, DTensor)
    first, second = y.full_tensor()
    assert set(first.tolist()) == {0.0, 2.0}
    assert not torch.equal(first, second)


def worker(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    check_calls(mesh)
    check_refusals(mesh)
    check_dropout(mesh)
    dist.barrier()
    # Gloo's destructor waits, with the interpreter's lock, for a thread that may need that lock.
    os._exit(0)


def test_ops_on_shards() -> None:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port,), nprocs=2)

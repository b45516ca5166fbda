"""DDP, FSDP2, DTensor and tensor parallelism on two gloo processes: adapters train as in one."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import published
import pytest
import torch
import torch.distributed as dist
from compare import check_all, last_bit, named
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import fastadapters
from fastadapters import backends
from fastadapters.modules import BottleneckAdapter

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

BACKENDS = ["eager"] + [name for name in ("cpu",) if backends.unavailable(name) is None]
STEPS, BATCH, D = 3, 8, 24


def build(kind: str = "") -> nn.Module:
    torch.manual_seed(0)
    if kind == "patched fsdp2":
        return nn.Sequential(*(published.AdaptFormer(D, 6, layernorm="in") for _ in range(2)))
    return nn.Sequential(
        BottleneckAdapter(D, 6, init="bert", layernorm="in", scale="learnable"),
        nn.Linear(D, D),
        BottleneckAdapter(D, 8, init="houlsby", activation="gelu"),
    )


def shard(model: nn.Module, kind: str) -> nn.Module:
    """The model on two processes; "inner" kinds have the adapters' own layers sharded."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    adapters = [layer for layer in model if isinstance(layer, BottleneckAdapter)]
    if kind == "dtensor":
        return distribute_module(model, mesh)
    if kind == "patched fsdp2":
        assert len(fastadapters.patch(model).replaced) == 2
    if kind == "inner tensor parallel":
        plan = {"down_proj": ColwiseParallel(), "up_proj": RowwiseParallel()}
        for adapter in adapters:
            parallelize_module(adapter, mesh, plan)
        return model
    if kind == "inner fsdp2":
        for adapter in adapters:
            fully_shard(adapter.down_proj, mesh=mesh)
            fully_shard(adapter.up_proj, mesh=mesh)
    else:
        for layer in model:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module, batches: Tensor) -> list[Tensor]:
    """The parameters after a few steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x in batches:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def worker(rank: int, port: int, kind: str, backend: str, path: str) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = shard(build(kind), kind)
    batches = torch.randn(STEPS, BATCH, D, generator=torch.Generator().manual_seed(1))
    if kind == "dtensor":
        batches = distribute_tensor(batches, init_device_mesh("cpu", (2,)), [Shard(1)])
    elif kind != "inner tensor parallel":
        batches = batches.chunk(2, dim=1)[rank]
    with fastadapters.backend(backend):
        parameters = train(model, batches)
        decisions = fastadapters.explain(model, batches[0])
        ran = "layers" if kind.startswith("inner") else backends.resolve("bottleneck", batches)
    if {decision.backend for decision in decisions} != {ran}:
        os._exit(1)
    if rank == 0:
        torch.save(parameters, path)
    dist.barrier()
    # Gloo's destructor waits, with the interpreter's lock, for a thread that may need that lock.
    os._exit(0)


KINDS = [(kind, backend) for kind in ("ddp", "fsdp2") for backend in BACKENDS] + [
    (kind, "auto") for kind in ("inner fsdp2", "inner tensor parallel", "patched fsdp2", "dtensor")
]


@pytest.mark.parametrize(("kind", "backend"), KINDS)
def test_two_processes_train_like_one(kind: str, backend: str, tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    path = str(tmp_path / "parameters.pt")
    torch.multiprocessing.spawn(worker, (port, kind, backend, path), nprocs=2)
    batches = torch.randn(STEPS, BATCH, D, generator=torch.Generator().manual_seed(1))

    def pair(draw: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        moved = last_bit(batches, draw, batches.dtype)
        with fastadapters.backend("reference"):
            gold = train(build(kind).double(), moved.double())
            return named(gold), named(train(build(kind), moved))

    check_all(named(torch.load(path)), pair)

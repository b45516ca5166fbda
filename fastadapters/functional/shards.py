"""The ops on DTensors: each process calls the op on what it holds.

Rows and items do not depend on each other. So where they are sharded, and all that they share is
replicated, the shards of the result are the op of the shards, and a gradient of what is shared is
the sum of the processes' gradients: a partial sum to DTensor, which adds up when it is read.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_map_only

from .arguments import dropout_stream

Result = TypeVar("Result")


def _module() -> Any:
    """torch.distributed.tensor, if anything has imported it: else there is no DTensor."""
    return sys.modules.get("torch.distributed.tensor")


def is_sharded(t: object) -> bool:
    """Whether t is a DTensor."""
    module = _module()
    return module is not None and isinstance(t, module.DTensor)


def is_replicated(t: Any) -> bool:
    """Whether t is a DTensor of which each process holds all."""
    return is_sharded(t) and all(p.is_replicate() for p in t.placements)


def _tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """What tensors are in an argument, by their names: down[0][1]."""
    for path, leaf in tree_flatten_with_path(value)[0]:
        if isinstance(leaf, Tensor):
            yield name + "".join(map(str, path)), leaf


def _why_not(
    x: Any, rows: Mapping[str, Any], shared: Mapping[str, Any], dims: int, random: bool
) -> str | None:
    """Why the shards of the result are not the op of the shards."""
    for i, placement in enumerate(x.placements):
        if placement.is_partial():
            return "the activations are a sum over processes that is not yet taken"
        if placement.is_shard() and placement.dim >= dims:
            return f"dimension {placement.dim} of {x.dim()} of the activations is sharded"
        if placement.is_replicate() and random and x.device_mesh.size(i) > 1:
            return "replicas of rows need the same dropout mask"
    for kind, values in (("rows", rows), ("shared", shared)):
        for name, value in values.items():
            for at, t in _tensors(name, value):
                if not isinstance(t, type(x)):
                    return f"{at} is a {type(t).__name__}, not a DTensor as the activations"
                if t.device_mesh != x.device_mesh:
                    return f"{at} is on another device mesh"
                if kind == "shared" and not is_replicated(t):
                    return f"{at} is sharded"
    return None


def on_shards(
    op: Callable[..., Result], values: Mapping[str, Any], rows: Sequence[str], behind: int
) -> Result | str:
    """The result of an op on DTensors, or why the op does not run on their shards.

    Args:
        op: a function of this package.
        values: its arguments by name.
        rows: the names of those that have rows, or items, of their own: tensors, or lists of them;
            the first tells how all are sharded.
        behind: how many of their last dimensions must be whole.
    """
    x: Any = values[rows[0]]
    x = x[0] if isinstance(x, (list, tuple)) and x else x
    if not is_sharded(x):
        return "it reads plain tensors, not a subclass"
    of_rows = {name: values[name] for name in rows}
    shared = {name: value for name, value in values.items() if name not in of_rows}
    random = bool(values.get("training") and (values.get("dropout") or values.get("input_dropout")))
    refusal = _why_not(x, of_rows, shared, x.dim() - behind, random)
    if refusal is not None:
        return f"it runs on shards of rows, and {refusal}"
    mesh, placements = x.device_mesh, x.placements
    sums = [_module().Partial() if p.is_shard() else p for p in placements]
    locals_: dict[int, Tensor] = {}  # x as its own residual is known by identity

    def shard(t: Any) -> Tensor:
        if id(t) not in locals_:
            placed = t if t.placements == placements else t.redistribute(placements=placements)
            locals_[id(t)] = placed.to_local(grad_placements=placements)
        return locals_[id(t)]

    def whole(t: Any) -> Tensor:
        local: Tensor = t.to_local(grad_placements=sums)
        return local

    def place(y: Tensor) -> Any:
        shape = list(y.shape)
        for p in placements:
            if p.is_shard():
                shape[p.dim] = x.shape[p.dim]
        stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return _module().DTensor.from_local(
            y, mesh, placements, run_check=False, shape=tuple(shape), stride=tuple(stride)
        )

    local = tree_map_only(Tensor, shard, of_rows) | tree_map_only(Tensor, whole, shared)
    with dropout_stream(mesh.get_rank() if random else 0):
        result: Result = tree_map_only(Tensor, place, op(**local))
    return result

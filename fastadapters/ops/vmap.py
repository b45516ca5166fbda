"""Ops that take lists of tensors, called on batches of arguments: one call after the other.

PyTorch does that by itself for ops without lists. It has two kinds of batched tensors: those of
`torch.func.vmap`, and those of `torch.autograd.grad` with `is_grads_batched`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_MOST_LEVELS = 64  # of `is_grads_batched` within each other


def _loop(
    op: torch._ops.OpOverload, flat: Sequence[Any], spec: Any, dims: Sequence[int | None]
) -> Any:
    """The results for each index into the dimensions that are not None, stacked."""
    pairs = list(zip(flat, dims, strict=True))
    size = next(t.shape[dim] for t, dim in pairs if dim is not None)
    calls = [
        op(*pytree.tree_unflatten([t if d is None else t.select(d, i) for t, d in pairs], spec))
        for i in range(size)
    ]
    return pytree.tree_map(lambda *results: torch.stack(results), *calls)


def _unbatched(t: Any, level: int) -> Tensor | None:
    """``t`` with its batch of that level in front; None if it has none."""
    if not isinstance(t, Tensor) or not torch._C._functorch.is_legacy_batchedtensor(t):
        return None
    bare = torch._remove_batch_dim(t, level, 0, 0)
    return bare if bare.shape[0] else None  # what has none is expanded to the size given, 0


def _deepest() -> int:
    """A level at or above that of every batched tensor, which does not tell its own.

    The level of the calls around, which only the thread that made them knows: on a GPU backward
    runs in another.
    """
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level or _MOST_LEVELS


def register(library: torch.library.Library, name: str) -> None:
    """Let op ``name`` of ``library`` be called on both kinds."""
    op = getattr(getattr(torch.ops, library.ns), name).default

    def vmapped(info: Any, in_dims: Any, *args: Any) -> tuple[Any, int]:
        flat, spec = pytree.tree_flatten(args)
        return _loop(op, flat, spec, pytree.tree_leaves(in_dims)), 0

    def batched(*args: Any) -> Any:
        flat, spec = pytree.tree_flatten(args)
        for level in range(_deepest(), 0, -1):
            bare = [_unbatched(t, level) for t in flat]
            if any(b is not None for b in bare):
                break
        values = [t if b is None else b for t, b in zip(flat, bare, strict=True)]
        outputs = _loop(op, values, spec, [None if b is None else 0 for b in bare])
        return pytree.tree_map(lambda t: torch._add_batch_dim(t, 0, level), outputs)

    torch.library.register_vmap(f"{library.ns}::{name}", vmapped, lib=library)
    library.impl(name, batched, "Batched")

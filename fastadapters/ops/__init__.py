"""The fused ops as PyTorch operators.

A namespace is one set of kernels behind the same schemas: ``torch.ops.fastadapters`` has those of
the compiled library (CPU and CUDA), ``torch.ops.fastadapters_triton`` those of
``fastadapters.kernels``, which is imported when the first of them is called. The schemas are
defined here, so that they exist with or without kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import (
    bottleneck,
    cross_modal_attention,
    flops,
    grouped,
    multimodal,
    multiway,
    sequence_fusion,
)
from .schemas import COMPILED, TRITON, define_allow_tf32, implement_lazily

_OPS = (bottleneck, sequence_fusion, cross_modal_attention, multimodal)


def define(namespace: str, keys: Sequence[str]) -> torch.library.Library:
    """Declare every op in ``namespace``, whose kernels are for these dispatch keys."""
    library = torch.library.Library(namespace, "DEF")
    for op in _OPS:
        op.define(library)
    multiway.define(library, keys)
    grouped.define(library)
    define_allow_tf32(library)
    return library


_compiled = define(COMPILED, ("CPU", "CUDA"))
bottleneck.define_fallback(_compiled)

_triton = define(TRITON, ("CompositeExplicitAutograd",))
for _op in _OPS:
    _stem = _op.__name__.rpartition(".")[2]
    implement_lazily(_triton, _op.SCHEMAS, f"..kernels.{_stem}")
implement_lazily(_triton, grouped.SCHEMAS, "..kernels.bottleneck")

flops.register(
    (COMPILED, TRITON),
    {name: formula for op in (*_OPS, multiway, grouped) for name, formula in op.FLOPS.items()},
)

# The namespace that each fused backend's kernels are in.
NAMESPACES: dict[str, Any] = {
    "cpu": getattr(torch.ops, COMPILED),
    "cuda": getattr(torch.ops, COMPILED),
    "triton": getattr(torch.ops, TRITON),
}

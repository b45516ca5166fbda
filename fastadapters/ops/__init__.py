"""The fused ops as PyTorch operators.

A namespace is one set of kernels behind the same schemas: ``torch.ops.fastadapters`` has those of
the compiled library (CPU and CUDA), ``torch.ops.fastadapters_triton`` those of
``fastadapters.kernels``, which is imported when the first of them is called.
"""

from __future__ import annotations

from typing import Any

import torch

from . import bottleneck, flops, multiway

_compiled = bottleneck.define("fastadapters")
multiway.define(_compiled, ("CPU", "CUDA"))
bottleneck.define_fallback(_compiled)
bottleneck.define_allow_tf32(_compiled)

_triton = bottleneck.define("fastadapters_triton")
multiway.define(_triton, ("CompositeExplicitAutograd",))
bottleneck.implement_lazily(_triton, "fastadapters.kernels.bottleneck")

flops.register("fastadapters", "fastadapters_triton")

# The namespace that each fused backend's kernels are in.
NAMESPACES: dict[str, Any] = {
    "cpu": torch.ops.fastadapters,
    "cuda": torch.ops.fastadapters,
    "triton": torch.ops.fastadapters_triton,
}

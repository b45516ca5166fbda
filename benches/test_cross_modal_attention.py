"""Attention of class texts and images, as an op of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastadapters import eager, functional, reference

from . import workloads
from .harness import Case, parameters
from .test_multimodal import ADDITIVE

WORKLOADS = workloads.CROSS_MODAL_ATTENTION


def case(w: workloads.CrossModalAttention, device: str, dtype: torch.dtype) -> Case:
    randn = parameters(device, dtype)
    inputs = {f"text_{kind}": randn(w.classes, w.heads, w.width) for kind in "qkv"}
    inputs |= {f"image_{kind}": randn(w.batch, 1, w.heads, w.width) for kind in "qkv"}

    def joined(fn: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        def call(**tensors: Tensor) -> Tensor:
            return torch.cat(fn(**tensors, bias=ADDITIVE), dim=1)

        return call

    return Case(
        op="cross_modal_attention",
        workload=f"{w.name}: C {w.classes}, B {w.batch}",
        inputs=inputs,
        candidates={
            "ours": joined(functional.cross_modal_attention),
            "reference": joined(reference.cross_modal_attention),
            "eager": joined(eager.cross_modal_attention),
        },
        definition=joined(reference.cross_modal_attention),
        batched=tuple(name for name in inputs if name.startswith("image")),
        batch_part=8,
        reference_bytes=8 * w.batch * w.heads * (w.classes + 1) ** 2 * dtype.itemsize,
    )


def test_cross_modal_attention(bench, workload, dtype, direction, threads):
    bench(case, workload)

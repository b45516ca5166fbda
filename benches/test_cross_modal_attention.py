"""Attention of class texts and images, as an op of its own."""

from __future__ import annotations

from functools import partial

import torch

from fastadapters import eager, functional, reference

from . import workloads
from .harness import Case, parameters
from .test_multimodal import ADDITIVE

WORKLOADS = workloads.CROSS_MODAL_ATTENTION


def case(w: workloads.CrossModalAttention, device: str, dtype: torch.dtype) -> Case:
    randn = parameters(device, dtype)
    inputs = {f"text_{kind}": randn(w.classes, w.heads, w.width) for kind in "qkv"}
    inputs |= {f"image_{kind}": randn(w.batch, 1, w.heads, w.width) for kind in "qkv"}
    return Case(
        op="cross_modal_attention",
        workload=f"{w.name}: C {w.classes}, B {w.batch}",
        inputs=inputs,
        candidates={
            "ours": partial(functional.cross_modal_attention, bias=ADDITIVE),
            "reference": partial(reference.cross_modal_attention, bias=ADDITIVE),
            "eager": partial(eager.cross_modal_attention, bias=ADDITIVE),
        },
        definition=partial(reference.cross_modal_attention, bias=ADDITIVE),
        batched=tuple(name for name in inputs if name.startswith("image")),
        batch_part=8,
        reference_bytes=8 * w.batch * w.heads * (w.classes + 1) ** 2 * dtype.itemsize,
    )


def test_cross_modal_attention(bench, workload, dtype, direction, threads):
    bench(case, workload)

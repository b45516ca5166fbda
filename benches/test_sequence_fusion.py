"""The fusion of several modalities' sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastadapters import eager, functional, reference

from . import workloads
from .harness import Case, parameters

WORKLOADS = workloads.SEQUENCE_FUSION
AUTOCAST = True  # has rows for it
QUICK = ("float32", "autocast")  # the dtypes measured without --full
KINDS = ("x", "down_weight", "down_bias", "time_factor", "feature_factor")


def case(w: workloads.SequenceFusion, device: str, dtype: torch.dtype) -> Case:
    randn = parameters(device, dtype)
    d, r = w.dim, w.bottleneck
    sizes = list(zip(w.lengths, w.dims, strict=True))
    inputs = {f"x {i}": randn(w.batch, tokens, width) for i, (tokens, width) in enumerate(sizes)}
    for i, (tokens, width) in enumerate(sizes):
        inputs |= {
            f"down_weight {i}": randn(r, width, std=width**-0.5),
            f"down_bias {i}": randn(r, std=0.1),
            f"time_factor {i}": randn(w.rank, tokens, w.out_len, std=tokens**-0.5),
            f"feature_factor {i}": randn(w.rank, r, d, std=r**-0.5),
        }

    names = [[n for n in inputs if n.split()[0] == kind] for kind in KINDS]

    def ours(**tensors: Tensor) -> Tensor:
        """Lays the leading tokens, here those of the first modality, itself."""
        lists = [[tensors[n] for n in group] for group in names]
        return functional.sequence_fusion(*lists, activation="gelu", residual="leading")

    def fused(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(**tensors: Tensor) -> Tensor:
            lists = [[tensors[n] for n in group] for group in names]
            return fn(*lists, activation="gelu", residual=tensors["x 0"][:, : w.out_len])

        return call

    width = str(d) if not w.widths else list(w.widths)
    return Case(
        op="sequence_fusion",
        workload=f"{w.name}: B {w.batch}, T {list(w.lengths)}, D {width}, r {r}, rank {w.rank}",
        inputs=inputs,
        candidates={
            "ours": ours,
            "reference": fused(reference.sequence_fusion),
            "eager": fused(eager.sequence_fusion),
        },
        definition=fused(reference.sequence_fusion),
        batched=tuple(name for name in inputs if name.startswith("x ")),
    )


def test_sequence_fusion(bench, workload, dtype, direction, threads):
    bench(case, workload)

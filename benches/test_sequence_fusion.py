"""The fusion of several modalities' sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastadapters import eager, functional, reference

from . import workloads
from .harness import Case, parameters

WORKLOADS = workloads.SEQUENCE_FUSION
QUICK = ("float32",)  # the dtypes measured without --full, as long as there is no kernel
KINDS = ("x", "down_weight", "down_bias", "time_factor", "feature_factor")


def case(w: workloads.SequenceFusion, device: str, dtype: torch.dtype) -> Case:
    randn = parameters(device, dtype)
    d, r = w.dim, w.bottleneck
    inputs = {f"x {i}": randn(w.batch, tokens, d) for i, tokens in enumerate(w.lengths)}
    for i, tokens in enumerate(w.lengths):
        inputs |= {
            f"down_weight {i}": randn(r, d, std=d**-0.5),
            f"down_bias {i}": randn(r, std=0.1),
            f"time_factor {i}": randn(w.rank, tokens, w.out_len, std=tokens**-0.5),
            f"feature_factor {i}": randn(w.rank, r, d, std=r**-0.5),
        }

    def fused(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(**tensors: Tensor) -> Tensor:
            lists = [[t for n, t in tensors.items() if n.split()[0] == kind] for kind in KINDS]
            residual = torch.cat([x[:, : w.out_len] for x in lists[0]], dim=1)[:, : w.out_len]
            return fn(*lists, activation="gelu", residual=residual)

        return call

    return Case(
        op="sequence_fusion",
        workload=f"{w.name}: B {w.batch}, T {list(w.lengths)}, D {d}, r {r}, rank {w.rank}",
        inputs=inputs,
        candidates={
            "ours": fused(functional.sequence_fusion),
            "reference": fused(reference.sequence_fusion),
            "eager": fused(eager.sequence_fusion),
        },
        definition=fused(reference.sequence_fusion),
        batched=tuple(name for name in inputs if name.startswith("x ")),
    )


def test_sequence_fusion(bench, workload, dtype, direction, threads):
    bench(case, workload)

"""Samples of the multi-modal adapter's head, for its tests on every backend."""

from __future__ import annotations

import itertools
import math

import torch
from against_reference import Tensors
from torch import Tensor

from fastadapters import functional
from fastadapters.functional import MultiModalLayers

INF = math.inf
MASKED = ((-INF, 0.0), (0.0, -INF))
ADDITIVE = ((0.0, 1.0), (1.0, 0.0))
# Texts that see both, the image alone, the texts alone, nothing; images likewise.
BIASES = (MASKED, ADDITIVE, ((0.3, -1.0), (-INF, 2.0)), ((0, -INF), (0, 0)), ((-INF,) * 2,) * 2)
ADAPT = ("both", "image", "text")


def head_tensors(
    c: int,
    b: int,
    d: int,
    e: int,
    r: int,
    dtype: torch.dtype,
    down: int = 1,
    up: int = 2,
    seed: int = 0,
) -> Tensors:
    """Features and the parameters of ``down`` and ``up`` layers."""
    gen = torch.Generator().manual_seed(seed)
    widths = {
        "down": [d, *[r] * (down - 1), e],
        "in": [e, 3 * e],
        "out": [e, e],
        "up": [e, *[r] * (up - 1), d],
    }
    tensors = {"text": torch.randn(c, d, generator=gen), "image": torch.randn(b, d, generator=gen)}
    for name, sizes in widths.items():
        for k, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
            tensors[f"{name}{k}.weight"] = torch.randn(n_out, n_in, generator=gen) * n_in**-0.5
            tensors[f"{name}{k}.bias"] = torch.randn(n_out, generator=gen) * 0.2
    return {name: t.to(dtype) for name, t in tensors.items()}


def arguments(tensors: Tensors) -> tuple[object, ...]:
    """``head_tensors`` as the positional arguments of `functional.multimodal_logits`."""

    def layers(name: str) -> list[tuple[Tensor, Tensor]]:
        keys = [f"{name}{k}" for k in range(2) if f"{name}{k}.weight" in tensors]
        return [(tensors[f"{key}.weight"], tensors[f"{key}.bias"]) for key in keys]

    return (
        tensors["text"], tensors["image"],
        MultiModalLayers(layers("down"), layers("in")[0], layers("out")[0], layers("up")),
    )  # fmt: skip


def logits(tensors: Tensors, **options: object) -> Tensor:
    return functional.multimodal_logits(
        *arguments(tensors), **{"num_heads": 4, "logit_scale": 50.0, **options}
    )

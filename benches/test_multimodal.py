"""The adapter head of CLIP: from text and image features to logits."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastadapters import eager, functional, reference

from . import workloads
from .harness import COMPILE_MODES, Case, parameters

WORKLOADS = workloads.MULTIMODAL
QUICK = ("float32", "bfloat16")  # the dtypes measured without --full
LAYERS = ("down0", "in_proj", "out_proj", "up0", "up1")
# Inside and across modalities: what the paper says, and what the authors' code adds.
MASKED = ((-math.inf, 0.0), (0.0, -math.inf))
ADDITIVE = ((0.0, 1.0), (1.0, 0.0))
# Inductor stores a whole vector for each row of 4 heads and corrupts the heap (PyTorch 2.13).
MISCOMPILED = "https://github.com/pytorch/pytorch/issues/196681"


def eagerly(text, image, layers, **options):
    """`eager` in fp32 whatever the dtype, as the op has it."""

    def wide(pairs):
        return [(weight.float(), bias.float()) for weight, bias in pairs]

    down, *projections, up = layers
    layers = functional.MultiModalLayers(wide(down), *wide(projections), wide(up))
    logits = eager.multimodal_logits(text.float(), image.float(), layers, **options)
    return logits.to(image.dtype)


def case(w: workloads.Multimodal, device: str, dtype: torch.dtype) -> Case:
    randn = parameters(device, dtype)
    d, a, r = w.dim, w.attn_dim, w.hidden
    inputs = {"text": randn(w.classes, d), "image": randn(w.batch, d)}
    sizes = ((a, d), (3 * a, a), (a, a), (r, a), (d, r))
    for name, (out, into) in zip(LAYERS, sizes, strict=True):
        inputs[f"{name}_weight"] = randn(out, into, std=into**-0.5)
        inputs[f"{name}_bias"] = randn(out, std=0.1)

    def adapted(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(text: Tensor, image: Tensor, **layers: Tensor) -> Tensor:
            down, in_proj, out_proj, up0, up1 = (
                (layers[f"{name}_weight"], layers[f"{name}_bias"]) for name in LAYERS
            )
            return fn(
                text, image, functional.MultiModalLayers([down], in_proj, out_proj, [up0, up1]),
                num_heads=w.heads, logit_scale=100.0, bias=MASKED if w.masked else ADDITIVE,
                blend=0.2, adapt=w.adapt,
            )  # fmt: skip

        return call

    scores = w.batch * w.heads * (w.classes + 1) ** 2 * dtype.itemsize
    return Case(
        op="multimodal_logits",
        workload=f"{w.name}: C {w.classes}, B {w.batch}",
        inputs=inputs,
        candidates={
            "ours": adapted(functional.multimodal_logits),
            "reference": adapted(reference.multimodal_logits),
            "eager": adapted(eagerly),
        },
        definition=adapted(reference.multimodal_logits),
        batched=("image",),
        batch_part=8,
        reference_bytes=8 * scores,
        untrainable=dict.fromkeys(
            (f"{mode} eager" for mode in COMPILE_MODES if device == "cpu"), MISCOMPILED
        ),
    )


def test_multimodal(bench, workload, dtype, direction, threads):
    bench(case, workload)

"""Samples of cross-modal attention for the tests of its kernels, on every backend."""

from __future__ import annotations

import math
from typing import Any

import torch
from against_reference import Tensors
from compare import last_bit
from torch import Tensor

from fastadapters import reference
from fastadapters.reference.cross_modal_attention import Bias

INF = math.inf
MASKED = ((-INF, 0.0), (0.0, -INF))
ADDITIVE = ((0.0, 1.0), (1.0, 0.0))
BIASES = (MASKED, ADDITIVE, ((0.3, -1.0), (-INF, 2.0)), ((0.0, -INF), (0.0, 0.5)))
NAMES = tuple(f"{modality}_{kind}" for modality in ("text", "image") for kind in "qkv")
OUTPUTS = {"text": 1, "image": 2, "both": 3}

# C, I, B, H, d
SIZES = (
    (1, 1, 7, 2, 32),
    (3, 1, 7, 2, 8),
    (37, 1, 5, 4, 32),
    (7, 3, 4, 2, 16),
    (2, 2, 20, 2, 8),
    (130, 2, 3, 2, 33),
    (5, 60, 2, 1, 40),
    (20, 1, 9, 1, 128),
)


def attention_tensors(
    sizes: tuple[int, ...], dtype: torch.dtype, per_item: bool = False, seed: int = 0
) -> Tensors:
    c, i, b, h, d = sizes
    gen = torch.Generator().manual_seed(seed)
    shapes = {"text": (*[b] * per_item, c, h, d), "image": (b, i, h, d)}
    return {
        name: torch.randn(shapes[name.partition("_")[0]], generator=gen).to(dtype) for name in NAMES
    }


def cotangents(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Gradients of both outputs."""
    image, gen = tensors["image_q"], torch.Generator().manual_seed(1)
    b, _, h, d = image.shape
    shapes = ((b, tensors["text_q"].shape[-3], h, d), image.shape)
    text, image = (torch.randn(shape, generator=gen).to(image.dtype) for shape in shapes)
    return text, image


def numbers(bias: Bias) -> tuple[float, ...]:
    return (*bias[0], *bias[1])


def call(
    kernels: Any, tensors: Tensors, bias: Bias, outputs: str = "both", needs: int = 63
) -> Tensors:
    """Outputs and gradients asked for, by the ops of a namespace."""
    values = [tensors[name] for name in NAMES]
    options = (0.3, *numbers(bias), OUTPUTS[outputs])
    *outs, state = kernels.cross_modal_attention_forward(*values, *options, True)
    d_outs = cotangents(tensors)
    wanted = [OUTPUTS[outputs] >> i & 1 for i in range(2)]
    gradients = kernels.cross_modal_attention_backward(
        *(d if want else None for d, want in zip(d_outs, wanted, strict=True)),
        *values, state, *options, needs,
    )  # fmt: skip
    results = {
        f"out {i}": out for i, (out, want) in enumerate(zip(outs, wanted, strict=True)) if want
    }
    for i, (name, gradient) in enumerate(zip(NAMES, gradients, strict=True)):
        if needs >> i & 1:
            results[f"d_{name}"] = gradient
    return results


def reference_pair(tensors: Tensors, bias: Bias, outputs: str = "both", needs: int = 63) -> Any:
    """`compare.check_all`'s second argument for what `call` gives."""
    dtype = tensors["image_q"].dtype

    def run(given: Tensors) -> Tensors:
        leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
        outs = reference.cross_modal_attention(**leaves, bias=bias, scale=0.3, outputs=outputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        d_outs = dict(zip(("text", "image"), cotangents(tensors), strict=True))
        names = ("text", "image") if outputs == "both" else (outputs,)
        gradients = torch.autograd.grad(
            outs, list(leaves.values()), [d_outs[n].to(outs[0].dtype) for n in names],
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        results = {f"out {OUTPUTS[n] - 1}": o.detach() for n, o in zip(names, outs, strict=True)}
        pairs = zip(NAMES, gradients, strict=True)
        return results | {f"d_{n}": g for i, (n, g) in enumerate(pairs) if needs >> i & 1}

    def pair(draw: int) -> tuple[Tensors, Tensors]:
        moved = {name: last_bit(t, draw, dtype) for name, t in tensors.items()}
        return run({name: t.double() for name, t in moved.items()}), run(moved)

    return pair

"""The bottleneck op against the published module, the best unfused PyTorch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapters import eager, functional, reference

from . import workloads
from .harness import Case, parameters

WORKLOADS = workloads.BOTTLENECK
AUTOCAST = True  # has rows for it


@torch.no_grad()
def leave_kink(
    x: Tensor, *, down_weight: Tensor, down_bias: Tensor, norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, **others: Tensor,
) -> None:  # fmt: skip
    """Zeroes the few rows of x with a z so near 0 that rounding may push it across relu's kink.

    That would turn a gradient on or off: an error as large as the gradient, in any form.
    """
    tensors = (x, down_weight, down_bias, norm_weight, norm_bias)
    rows, weight, bias, gain, shift = (None if t is None else t.float() for t in tensors)
    if gain is not None:
        rows = F.layer_norm(rows, rows.shape[-1:], gain, shift)
    x[(F.linear(rows, weight, bias).abs() < 1e-5).any(-1)] = 0.0


def case(w: workloads.Bottleneck, device: str, dtype: torch.dtype) -> Case:
    randn = parameters(device, dtype)
    d, r, out = w.dim, w.bottleneck, w.out_dim or w.dim
    inputs = {
        "x": randn(w.batch, w.tokens, d),
        "down_weight": randn(r, d, std=d**-0.5),
        "up_weight": randn(out, r, std=r**-0.5),
    }
    if w.bias:
        inputs |= {"down_bias": randn(r, std=0.1), "up_bias": randn(out, std=0.1)}
    if w.norm:
        inputs |= {"norm_weight": randn(d), "norm_bias": randn(d, std=0.1)}
    if w.residual == "other":
        inputs["residual"] = randn(w.batch, w.tokens, out)
    if w.activation == "relu":
        leave_kink(**inputs)

    options: dict[str, Any] = {"activation": w.activation, "scale": w.scale}
    if w.dropout:
        options["dropout"] = w.dropout
    if w.input_dropout:
        options["input_dropout"] = w.input_dropout

    def on_residual(fn: Callable[..., Tensor], **more: Any) -> Callable[..., Tensor]:
        if w.residual == "other":
            return partial(fn, **options, **more)
        return lambda x, **rest: fn(x, **rest, residual=x, **options, **more)

    def definition(**tensors: Tensor) -> Tensor:
        """With the seed that the functional layer draws from the same state of the generator."""
        seed = torch.randint(2**62, (2,), device=device) if w.dropout or w.input_dropout else None
        return on_residual(reference.bottleneck, seed=seed)(**tensors)

    return Case(
        op="bottleneck",
        workload=f"{w.name}: {list(inputs['x'].shape)} r {r}",
        inputs=inputs,
        candidates={
            "ours": on_residual(functional.bottleneck, training=True),
            "reference": on_residual(reference.bottleneck),
            "eager": on_residual(eager.bottleneck),
        },
        definition=definition,
    )


def test_bottleneck(bench, workload, dtype, direction, threads):
    bench(case, workload)

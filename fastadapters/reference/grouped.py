"""A bottleneck for each row, of N whose parameters are stacked, as its definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..options import Activation
from .bottleneck import bottleneck


def grouped_bottleneck(
    x: Tensor,
    index: Tensor,
    *,
    residual: Tensor | None = None,
    scale: float | Tensor = 1.0,
    activation: Activation = "relu",
    norm_eps: float = 1e-5,
    dropout: float = 0.0,
    input_dropout: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    **stacks: Any,
) -> Tensor:
    """y = residual + what adapter index[i...] makes of x[i...], shapes as in `functional`.

    Every adapter works on all rows, -1 to 1 in place of those that are not its own: a row that
    even LayerNorm with an eps of 0 takes. Rows whose index names none become NaN. Dtypes as in
    `bottleneck`.
    """
    options: dict[str, Any] = {
        "activation": activation,
        "norm_eps": norm_eps,
        "dropout": dropout,
        "input_dropout": input_dropout,
        "seed": seed,
        "compute_dtype": compute_dtype,
    }
    index = index.reshape(*index.shape, *[1] * (x.dim() - index.dim()))
    filler = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype, device=x.device)
    adapters, d_out, _ = stacks["up_weight"].shape
    y = x.new_full((*x.shape[:-1], d_out), torch.nan, dtype=compute_dtype)
    for n in range(adapters):
        own = index == n
        parameters: dict[str, Any] = {
            name: None if t is None else t[n] for name, t in stacks.items()
        }
        one: Any = scale[n] if isinstance(scale, Tensor) else scale
        branch = bottleneck(torch.where(own, x, filler), scale=one, **parameters, **options)
        y = torch.where(own, branch, y)
    return y if residual is None else residual + y

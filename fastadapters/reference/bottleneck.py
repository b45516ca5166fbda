"""The adapter bottleneck, as its definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import Activation
from .philox import drop, input_stream

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
}


def bottleneck(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: Activation = "relu",
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    dropout: float = 0.0,
    input_dropout: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = residual + scale * (dropout(act(x_in Wd^T + bd)) Wu^T + bu), x_in = dropout(norm(x)).

    Shapes as in `functional`. x and the norm's parameters have one dtype, all other parameters that
    of the products, ``compute_dtype`` (None: that of x); the residual is added as PyTorch promotes.
    The masks of dropout follow from ``seed``, or are PyTorch's own where there is none.
    """
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps)
    x = drop(x, input_dropout, None if seed is None else input_stream(seed))
    x = x if compute_dtype is None else x.to(compute_dtype)
    h = ACTIVATIONS[activation](F.linear(x, down_weight, down_bias))
    y = scale * F.linear(drop(h, dropout, seed), up_weight, up_bias)
    return y if residual is None else residual + y

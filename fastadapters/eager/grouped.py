"""A bottleneck for each row, of N whose parameters are stacked, in plain PyTorch calls."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import Activation
from ..reference.bottleneck import ACTIVATIONS
from ..reference.philox import drop, input_stream
from .bottleneck import bottleneck

Stacks = dict[str, Tensor]
Masks = tuple[Tensor | None, Tensor | None]  # of norm(x) and of h


def by_adapter(
    x: Tensor,
    index: Tensor,
    masks: Masks,
    residual: Tensor | None,
    scale: float | Tensor,
    stacks: Stacks,
    **options: Any,
) -> Tensor:
    """Each adapter that occurs, once, on its items of x [I, T, D].

    How many there are must be read: slow where that means to wait for a GPU, and impossible while
    PyTorch traces.
    """
    n = stacks["down_weight"].shape[0]
    order = index.argsort(stable=True)
    counts = index.bincount(minlength=n).tolist()
    # The gradient of `unbind` is one stack, those of N times `[n]` are N to be added up.
    parts = {name: t.unbind() for name, t in stacks.items()}
    scales = scale.unbind() if isinstance(scale, Tensor) else [scale] * n
    ys = []
    for i, items in enumerate(order.split(counts)):
        if counts[i]:
            own: dict[str, Any] = {name: t[i] for name, t in parts.items()}
            x_mask, h_mask, own["residual"] = (
                None if t is None else t.index_select(0, items) for t in (*masks, residual)
            )
            own["masks"] = (x_mask, None if h_mask is None else h_mask.flatten(0, 1))
            ys.append(bottleneck(x.index_select(0, items), scale=scales[i], **own, **options))
    return torch.cat(ys).index_select(0, order.argsort())


def all_at_once(
    x: Tensor,
    adapter: Tensor,
    masks: Masks,
    scale: float | Tensor,
    stacks: Stacks,
    activation: Activation,
    norm_eps: float,
    compute_dtype: torch.dtype,
) -> Tensor:
    """The N bottlenecks of width r as one of width N r, of which a row keeps what is its own's.

    N times the products, in a fixed number of calls, and nothing is read: for what traces, and for
    GPUs. Rows whose index names no adapter become NaN.
    """
    n, r, d_in = stacks["down_weight"].shape
    if "norm_weight" in stacks:
        own = adapter.clamp(0, n - 1)
        x = F.layer_norm(x, (d_in,), eps=norm_eps) * stacks["norm_weight"][own]
        if "norm_bias" in stacks:
            x = x + stacks["norm_bias"][own]
    if masks[0] is not None:
        x = x * masks[0]
    owner = torch.arange(n, device=x.device) == adapter.unsqueeze(1)  # [M, N]
    down_bias = stacks["down_bias"].flatten() if "down_bias" in stacks else None
    z = F.linear(x.to(compute_dtype), stacks["down_weight"].flatten(0, 1), down_bias)
    h = ACTIVATIONS[activation](z).unflatten(1, (n, r))
    if masks[1] is not None:
        h = h * masks[1].unsqueeze(1)
    of_none = h.new_zeros(()).where(owner.any(1), torch.nan).reshape(-1, 1, 1)
    h = h.where(owner.unsqueeze(2), of_none).flatten(1)
    if isinstance(scale, Tensor):
        scale = scale.reshape(n, -1)
    bias = None if "up_bias" not in stacks else stacks["up_bias"] * scale
    per_row = scale.unsqueeze(2) if isinstance(scale, Tensor) else scale
    up_weight = (stacks["up_weight"] * per_row).transpose(0, 1).flatten(1)
    y = F.linear(h, up_weight)
    return y if bias is None else y + owner.to(y.dtype) @ bias


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
    **stacks: Tensor | None,
) -> Tensor:
    """Same arguments and result as `fastadapters.reference.grouped_bottleneck`."""
    given = {name: t for name, t in stacks.items() if t is not None}
    (_, r, d_in), d_out = given["down_weight"].shape, given["up_weight"].shape[1]
    items = index.numel()
    compute = compute_dtype or x.dtype
    tokens = math.prod(x.shape[index.dim() : -1])

    def mask(p: float, seed: Tensor | None, columns: int, dtype: torch.dtype) -> Tensor | None:
        if p == 0.0:
            return None
        return drop(x.new_ones(items * tokens, columns, dtype=dtype), p, seed)

    masks = (
        mask(input_dropout, None if seed is None else input_stream(seed), d_in, x.dtype),
        mask(dropout, seed, r, compute),
    )
    options: dict[str, Any] = {
        "activation": activation, "norm_eps": norm_eps, "compute_dtype": compute,
    }  # fmt: skip
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if x.device.type == "cpu" and x.numel() and not traced:
        shape = (items, tokens, -1)
        x_mask, h_mask, rows = (None if t is None else t.reshape(shape) for t in (*masks, residual))
        y = by_adapter(
            x.reshape(shape), index.reshape(-1), (x_mask, h_mask), rows, scale, given, **options
        )
        return y.reshape(*x.shape[:-1], d_out)
    adapter = index.reshape(-1, 1).expand(items, tokens).reshape(-1)
    y = all_at_once(x.reshape(-1, d_in), adapter, masks, scale, given, **options)
    y = y.reshape(*x.shape[:-1], d_out)
    return y if residual is None else residual + y

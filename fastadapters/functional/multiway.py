"""Two bottlenecks side by side on the tokens of one tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from .. import backends
from ..checks import check_floats, check_split
from ..ops import NAMESPACES, autograd
from ..ops.codes import ACTIVATION_CODES, DTYPE_CODES
from ..options import Activation
from .arguments import (
    PLAIN,
    compute_and_out_dtype,
    draw_seed,
    leaf,
    parameter,
    plain_dropout,
    readable,
    saves,
)
from .bottleneck import (
    BottleneckParameters,
    bottleneck,
    check_bottleneck,
    check_options,
    plain_bottleneck,
    split_scale,
    storage,
)
from .shards import on_shards


def multiway_bottleneck(
    x: Tensor,
    split: int,
    first: BottleneckParameters,
    second: BottleneckParameters,
    *,
    activation: Activation = "relu",
    residual: Tensor | None = None,
    norm_eps: float = 1e-5,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Two bottlenecks on the tokens of one tensor, one per modality (MultiWay-Adapter).

    Args:
        x: [..., T, D], with T tokens.
        split: the first ``split`` tokens go through ``first``, the others through ``second``;
            -1 sends all through ``first``, 0 none (torchscale's convention).
        first, second: the adapters' parameters; their widths r may differ.
        activation, residual, norm_eps, dropout, training: as in `bottleneck`.

    Returns:
        y: [..., T, D], contiguous. Both halves are written in place, without concatenation, where
        a fused backend runs.

    Raises:
        As `bottleneck`; ValueError if ``split`` is not in [-1, T].

    Examples:
        >>> image, text = (
        ...     BottleneckParameters(torch.randn(r, 768), torch.randn(768, r)) for r in (64, 16)
        ... )
        >>> multiway_bottleneck(torch.randn(2, 197 + 52, 768), 197, image, text).shape
        torch.Size([2, 249, 768])
    """
    if isinstance(x, Proxy):
        return leaf(multiway_bottleneck, locals())
    sharded = (
        None
        if type(x) in backends.PLAIN_TYPES
        else on_shards(multiway_bottleneck, locals(), ("x", "residual"), 2)
    )
    if sharded is not None and not isinstance(sharded, str):
        return sharded
    check_floats("x", x, "[..., T, D]")
    if x.dim() < 2:
        raise ValueError(f"x: expected a tensor [..., T, D], got {list(x.shape)}")
    for name, side in (("first", first), ("second", second)):
        if not isinstance(side, BottleneckParameters):
            raise TypeError(f"{name}: expected BottleneckParameters, got {type(side).__name__}")
    tokens = x.shape[-2]
    split = check_split(split, tokens)
    options: dict[str, Any] = {
        "activation": activation,
        "norm_eps": norm_eps,
        "dropout": dropout,
        "training": training,
    }
    if split in (-1, 0, tokens):
        only = second if split == 0 else first
        return bottleneck(x, **only._asdict(), residual=residual, **options)
    first, second = (
        side._replace(scale=check_bottleneck(x, *side, residual)) for side in (first, second)
    )
    norm_eps, dropout = check_options(activation, norm_eps, dropout, training)
    options |= {"norm_eps": norm_eps, "dropout": dropout}
    dtype, out = compute_and_out_dtype(x, residual, first.scale, second.scale)
    r = max(first.down_weight.shape[0], second.down_weight.shape[0])
    problem = backends.Problem(x.shape[-1], r, dtype, out, (residual, *first, *second), sharded)
    name = backends.resolve("bottleneck", x, problem)
    if name in PLAIN:
        del options["training"]
        halves = []
        for side, tokens_of in ((first, slice(None, split)), (second, slice(split, None))):
            part = x[..., tokens_of, :]
            other = None if residual is None else residual[..., tokens_of, :]
            options["seed"], options["dropout"] = plain_dropout(x, dropout, training)
            halves.append(plain_bottleneck(name, part, side, other, dtype, out, **options))
        return torch.cat(halves, dim=-2)
    x, residual, add_x = storage(x, residual, dtype, out)
    tensors: list[Any] = [readable(x), None if residual is None else readable(residual)]
    scale_values = []
    for side in (first, second):
        learnable, scale_value = split_scale(side.scale)
        parameters = (
            side.down_weight, side.down_bias, side.up_weight, side.up_bias, side.norm_weight,
            side.norm_bias, learnable,
        )  # fmt: skip
        tensors += (parameter(t, dtype) for t in parameters)
        tensors.append(draw_seed(x, dropout, training))
        scale_values.append(scale_value)
    y: Tensor = autograd.call(
        NAMESPACES[name].multiway_forward.default, tensors,
        (split, *scale_values, norm_eps, dropout, ACTIVATION_CODES[activation], DTYPE_CODES[dtype],
         DTYPE_CODES[out], add_x, saves(tensors)),
    )  # fmt: skip
    return y

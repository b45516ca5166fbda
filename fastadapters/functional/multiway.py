"""Two bottlenecks side by side on the tokens of one tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..checks import check_split
from ..ops import NAMESPACES, autograd
from ..ops.bottleneck import ACTIVATION_CODES
from .arguments import PLAIN, compute_dtype, draw_seed, parameter, readable, saves
from .bottleneck import (
    BottleneckParameters,
    bottleneck,
    check_bottleneck,
    plain_bottleneck,
    split_scale,
)


def multiway_bottleneck(
    x: Tensor,
    split: int,
    first: BottleneckParameters,
    second: BottleneckParameters,
    *,
    activation: str = "relu",
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
    """
    if not isinstance(x, Tensor) or x.dim() < 2:
        given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise (ValueError if isinstance(x, Tensor) else TypeError)(
            f"x: expected a tensor [..., T, D], got {given}"
        )
    tokens = x.shape[-2]
    check_split(split, tokens)
    options: dict[str, Any] = {
        "activation": activation,
        "norm_eps": norm_eps,
        "dropout": dropout,
        "training": training,
    }
    if split in (-1, 0, tokens):
        only = second if split == 0 else first
        return bottleneck(x, **only._asdict(), residual=residual, **options)
    for side in (first, second):
        check_bottleneck(
            x, side.down_weight, side.up_weight, side.down_bias, side.up_bias, activation,
            side.scale, residual, side.norm_weight, side.norm_bias, dropout,
        )  # fmt: skip
    add_x = residual is x
    x = x.to(compute_dtype(x))
    name = backends.resolve("bottleneck", x)
    if name in PLAIN:
        del options["training"]
        halves = []
        for side, tokens_of in ((first, slice(None, split)), (second, slice(split, None))):
            part = x[..., tokens_of, :]
            other = None if residual is None or add_x else residual[..., tokens_of, :]
            options["seed"] = draw_seed(x, dropout, training)
            halves.append(plain_bottleneck(name, part, side, part if add_x else other, **options))
        return torch.cat(halves, dim=-2)
    x = readable(x)
    residual = None if residual is None or add_x else readable(residual.to(x.dtype))
    tensors: list[Any] = [x, residual]
    scale_values = []
    for side in (first, second):
        learnable, scale_value = split_scale(side.scale)
        parameters = (
            side.down_weight, side.down_bias, side.up_weight, side.up_bias, side.norm_weight,
            side.norm_bias, learnable,
        )  # fmt: skip
        tensors += (parameter(t, x.dtype) for t in parameters)
        tensors.append(draw_seed(x, dropout, training))
        scale_values.append(scale_value)
    return autograd.call(
        NAMESPACES[name].multiway_forward.default, tensors,
        (split, *scale_values, norm_eps, dropout, ACTIVATION_CODES[activation], add_x,
         saves(tensors)),
    )  # fmt: skip

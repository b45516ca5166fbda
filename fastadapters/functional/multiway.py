"""Bottlenecks side by side on the tokens of one tensor, one per modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from .. import backends
from ..checks import check_list, check_split, check_splits, check_tokens
from ..ops import NAMESPACES, autograd
from ..ops.codes import ACTIVATION_CODES, DTYPE_CODES
from ..options import Activation
from . import grouped
from .arguments import (
    PLAIN,
    compute_and_out_dtype,
    draw_seed,
    leaf,
    plain_seed,
    readable,
    saves,
)
from .bottleneck import (
    BottleneckParameters,
    bottleneck,
    check_bottleneck,
    check_options,
    plain_bottleneck,
    read_parameters,
    storage,
)
from .shards import on_shards


def multiway_bottleneck(
    x: Tensor,
    split: int | Sequence[int],
    first: BottleneckParameters,
    second: BottleneckParameters,
    *,
    others: Sequence[BottleneckParameters] = (),
    activation: Activation = "relu",
    residual: Tensor | None = None,
    norm_eps: float = 1e-5,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Bottlenecks on the tokens of one tensor, one per modality (MultiWay-Adapter).

    Args:
        x: [..., T, D], with T tokens.
        split: the first ``split`` tokens go through ``first``, the others through ``second``;
            -1 sends all through ``first``, 0 none (torchscale's convention). Or a sequence: where
            the tokens of each adapter but the first begin, in order; an adapter may have none.
        first, second: the adapters' parameters; their widths r may differ.
        others: those of a third modality and so on.
        activation, residual, norm_eps, dropout, training: as in `bottleneck`.

    Returns:
        y: [..., T, D], contiguous. All parts are written in place, without concatenation, where a
        fused backend runs; with three and more if all or none of them have a LayerNorm.

    Raises:
        As `bottleneck`; ValueError if ``split`` is not in [-1, T], or if a sequence is not one per
        boundary and in order.

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
    check_tokens(x)
    others = check_list("others", others, "a list of BottleneckParameters")
    named: list[tuple[str, BottleneckParameters]] = [
        ("first", first),
        ("second", second),
        *(("others", side) for side in others),
    ]
    for name, side in named:
        if not isinstance(side, BottleneckParameters):
            raise TypeError(f"{name}: expected BottleneckParameters, got {type(side).__name__}")
    tokens = x.shape[-2]
    if isinstance(split, Sequence) or others:
        splits = split if isinstance(split, Sequence) else [split]
        begins = check_splits("split", splits, tokens, 2 + len(others))
    else:
        split = check_split(split, tokens)
        begins = [tokens if split == -1 else split]
    options: dict[str, Any] = {
        "activation": activation,
        "norm_eps": norm_eps,
        "dropout": dropout,
        "training": training,
    }
    bounds = zip([0, *begins], [*begins, tokens], strict=True)
    parts: list[tuple[BottleneckParameters, slice]] = [
        (side, slice(begin, end))
        for side, (begin, end) in zip((first, second, *others), bounds, strict=True)
        if end > begin
    ]
    if len(parts) < 2:
        only = parts[0][0] if parts else second
        return bottleneck(x, **only._asdict(), residual=residual, **options)
    sides = [
        side._replace(scale=check_bottleneck(x, *side, residual, square=True)) for side, _ in parts
    ]
    tokens_of = [part for _, part in parts]
    norm_eps, dropout, _ = check_options(activation, norm_eps, training, dropout)
    options |= {"norm_eps": norm_eps, "dropout": dropout}
    norms = {side.norm_weight is not None for side in sides}
    many = len(parts) > 2
    if many and len(norms) > 1:
        ys = []
        for side, part in zip(sides, tokens_of, strict=True):
            own = x[..., part, :]
            other = own if residual is x else None if residual is None else residual[..., part, :]
            ys.append(bottleneck(own, **side._asdict(), residual=other, **options))
        return torch.cat(ys, dim=-2)
    dtype, out = compute_and_out_dtype(x, residual, *(side.scale for side in sides))
    r = max(side.down_weight.shape[0] for side in sides)
    everything = (t for side in sides for t in side)
    problem = backends.Problem(
        x.shape[-1], r, dtype, out, (residual, *everything), sharded,
        adapters=len(parts) if many else 0,
    )  # fmt: skip
    name = backends.resolve("bottleneck", x, problem)
    del options["training"]
    same_mask = dropout > 0.0 and backends.chosen_by_name()
    if many and (name not in PLAIN or same_mask):
        places = torch.arange(tokens, device=x.device)
        index = torch.zeros_like(places)
        # A tensor of boundaries would be waited for, slices be compiled anew for a single token.
        for part in tokens_of[1:]:
            index += places >= part.start
        index = index.expand(x.shape[:-1]).contiguous()
        stack = _stacked(sides, r)
        return grouped.run(name, x, index, stack, residual, dtype, out, **options)
    if name in PLAIN:
        ys = []
        for side, part in zip(sides, tokens_of, strict=True):
            other = None if residual is None else residual[..., part, :]
            seed = plain_seed(x, dropout)
            ys.append(
                plain_bottleneck(
                    name, x[..., part, :], side, other, dtype, out, seed=seed, **options
                )
            )
        return torch.cat(ys, dim=-2)
    x, residual, add_x = storage(x, residual, dtype, out)
    tensors: list[Any] = [readable(x), None if residual is None else readable(residual)]
    scale_values = []
    for side in sides:
        parameters, scale_value = read_parameters(side, dtype)
        tensors += parameters
        tensors.append(draw_seed(x, dropout))
        scale_values.append(scale_value)
    y: Tensor = autograd.call(
        NAMESPACES[name].multiway_forward.default, tensors,
        (tokens_of[1].start, *scale_values, norm_eps, dropout, ACTIVATION_CODES[activation],
         DTYPE_CODES[dtype], DTYPE_CODES[out], add_x, saves(tensors)),
    )  # fmt: skip
    return y


def _stacked(sides: Sequence[BottleneckParameters], r: int) -> BottleneckParameters:
    """Adapters as one stack of width ``r``: what one lacks is zeros, and so is its h there."""

    def stack(name: str) -> Tensor | None:
        given = [getattr(side, name) for side in sides]
        like = next((t for t in given if t is not None), None)
        if like is None:
            return None
        return torch.stack([torch.zeros_like(like) if t is None else t for t in given])

    sides = [_widened(side, r) for side in sides]
    scales = [side.scale for side in sides]
    scale = scales[0]
    if any(isinstance(s, Tensor) or s != scale for s in scales):
        device = sides[0].down_weight.device
        vectors = [torch.as_tensor(s, device=device).reshape(-1) for s in scales]
        width = max(v.numel() for v in vectors)
        scale = torch.stack([v.expand(width) for v in vectors]).squeeze(1)
    return BottleneckParameters(
        torch.stack([side.down_weight for side in sides]),
        torch.stack([side.up_weight for side in sides]),
        stack("down_bias"), stack("up_bias"), scale, stack("norm_weight"), stack("norm_bias"),
    )  # fmt: skip


def _widened(side: BottleneckParameters, r: int) -> BottleneckParameters:
    missing = r - side.down_weight.shape[0]
    if missing == 0:
        return side
    return side._replace(
        down_weight=F.pad(side.down_weight, (0, 0, 0, missing)),
        down_bias=None if side.down_bias is None else F.pad(side.down_bias, (0, missing)),
        up_weight=F.pad(side.up_weight, (0, missing)),
    )

"""The adapter bottleneck: checks, dtypes, choice of the backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Proxy

from .. import backends
from ..checks import (
    check_choice,
    check_eps,
    check_flag,
    check_floats,
    check_number,
    check_probability,
    check_residual,
    check_tensor,
)
from ..ops import NAMESPACES, autograd
from ..ops.codes import ACTIVATION_CODES, DTYPE_CODES
from ..options import Activation
from .arguments import (
    PLAIN,
    compute_and_out_dtype,
    draw_seed,
    leaf,
    parameter,
    plain_seed,
    readable,
    saves,
    without_autocast,
)
from .shards import on_shards


def check_bottleneck(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    scale: float | Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    square: bool = False,
) -> float | Tensor:
    """x, a residual and the `BottleneckParameters` must fit; the scale, a number as a float.

    ``square``: D_in and D_out must be one D.
    """
    d_in, d_out = ("D", "D") if square else ("D_in", "D_out")
    check_floats("x", x, f"[..., {d_in}]")
    shape, device = x.shape, x.device
    if not shape or shape[-1] == 0:
        raise ValueError(f"x: expected [..., {d_in}] with {d_in} >= 1, got {list(shape)}")
    d = out = shape[-1]
    check_floats("down_weight", down_weight, f"[r, {d_in}]")
    shape = down_weight.shape
    if len(shape) != 2 or shape[0] == 0:
        raise ValueError(f"down_weight: expected [r, {d_in}] with r >= 1, got {list(shape)}")
    r = shape[0]
    check_tensor("down_weight", down_weight, f"[r, {d_in}]", (r, d), device)
    check_floats("up_weight", up_weight, f"[{d_out}, r]")
    shape = up_weight.shape
    if not square and len(shape) == 2 and shape[0] > 0:
        out = shape[0]
    check_tensor("up_weight", up_weight, f"[{d_out}, r]", (out, r), device)
    if down_bias is not None:
        check_tensor("down_bias", down_bias, "[r]", (r,), device)
    if up_bias is not None:
        check_tensor("up_bias", up_bias, f"[{d_out}]", (out,), device)
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, f"[{d_in}]", (d,), device)
    if norm_bias is not None:
        if norm_weight is None:
            raise ValueError("norm_bias: expected None without norm_weight, got a tensor")
        check_tensor("norm_bias", norm_bias, f"[{d_in}]", (d,), device)
    check_residual(residual, x, out)
    if not isinstance(scale, Tensor) or (scale.dim() == 0 and not scale.is_floating_point()):
        return check_number("scale", scale, " or a tensor")
    if scale.dim() == 0:
        check_tensor("scale", scale, "[]", (), device)
    else:
        one = scale.dim() == 1 and scale.numel() == 1
        check_tensor("scale", scale, f"[1] or [{d_out}]", (1,) if one else (out,), device)
    return scale


def check_options(
    activation: Activation,
    norm_eps: float,
    training: bool,
    dropout: float,
    input_dropout: float = 0.0,
) -> tuple[float, float, float]:
    """The options must be what they are named; eps and the probabilities, 0 if not training."""
    check_choice("activation", activation, ACTIVATION_CODES)
    check_flag("training", training)
    norm_eps = check_eps("norm_eps", norm_eps)
    dropout = check_probability("dropout", dropout)
    input_dropout = check_probability("input_dropout", input_dropout)
    return (norm_eps, dropout, input_dropout) if training else (norm_eps, 0.0, 0.0)


class BottleneckParameters(NamedTuple):
    """The parameters of one bottleneck, named and shaped as in `bottleneck`.

    Examples:
        >>> side = BottleneckParameters(torch.randn(64, 768), torch.zeros(768, 64), scale=0.1)
        >>> bottleneck(torch.randn(4, 768), **side._asdict()).shape
        torch.Size([4, 768])
    """

    down_weight: Tensor
    up_weight: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    scale: float | Tensor = 1.0
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None


def cast_parameters(side: BottleneckParameters, x: Tensor, compute: torch.dtype) -> dict[str, Any]:
    """What plain PyTorch takes: those of LayerNorm in the dtype of x, all others in ``compute``."""
    return {
        n: t.to(x.dtype if n.startswith("norm") else compute) if isinstance(t, Tensor) else t
        for n, t in side._asdict().items()
    }


def plain_bottleneck(
    name: str,
    x: Tensor,
    side: BottleneckParameters,
    residual: Tensor | None,
    compute: torch.dtype,
    out: torch.dtype,
    **options: Any,
) -> Tensor:
    """The bottleneck on backend ``name``, reference or eager; LayerNorm in the dtype of ``x``."""
    with without_autocast(x):
        y: Tensor = PLAIN[name].bottleneck(
            x, **cast_parameters(side, x, compute), residual=residual, compute_dtype=compute,
            **options,
        )  # fmt: skip
    return y.to(out)


def storage(
    x: Tensor, residual: Tensor | None, compute: torch.dtype, out: torch.dtype
) -> tuple[Tensor, Tensor | None, bool]:
    """(x, residual or None, whether the residual is x) in dtypes that the kernels read.

    x may be wider than the products, which round it; the residual has the dtype of the result.
    """
    add_x = residual is x and x.dtype == out
    if add_x:
        residual = None
    elif residual is not None and residual.dtype != out:
        residual = residual.to(out)
    if x.dtype != compute and x.dtype != torch.float32:
        x = x.to(compute)
    return x, residual, add_x


def split_scale(scale: float | Tensor) -> tuple[Tensor | None, float]:
    """A scale as the kernels take it: [1], [D_out] or None, and what to use without one."""
    if not isinstance(scale, Tensor):
        return None, scale
    return scale if scale.dim() else scale.reshape(1), 1.0


def read_parameters(
    side: BottleneckParameters, compute: torch.dtype
) -> tuple[list[Tensor | None], float]:
    """Parameters as the kernels read them, in the order of the schemas, and a scale's value."""
    learnable, scale_value = split_scale(side.scale)
    parameters = (
        side.down_weight, side.down_bias, side.up_weight, side.up_bias, side.norm_weight,
        side.norm_bias, learnable,
    )  # fmt: skip
    return [parameter(t, compute) for t in parameters], scale_value


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
    training: bool = False,
) -> Tensor:
    """The adapter bottleneck of AdaptFormer, MultiWay-Adapter, Houlsby and Pfeiffer, and LoRA.

        z = input_dropout(norm(x)) Wd^T + bd   [M, r]
        h = dropout(activation(z))             [M, r]
        y = residual + scale * (h Wu^T + bu)   [M, D_out]

    With the identity activation and residual = a frozen layer's output it is LoRA, whose dropout
    is ``input_dropout``.

    Args:
        x: [..., D_in], any strides; float32, bfloat16 or float16 (float64 runs eagerly). M is the
            product of the leading dimensions, 0 included.
        down_weight: Wd [r, D_in]; any r >= 1.
        up_weight: Wu [D_out, r]; D_out may be another width than D_in.
        down_bias: bd [r] or None.
        up_bias: bu [D_out] or None.
        activation: "relu", "gelu" (erf), "gelu_tanh", "silu", "quick_gelu" or "identity".
        scale: a number, or a learnable tensor [], [1] or [D_out] (one per channel).
        residual: a tensor [..., D_out], x itself where it has that shape (known by identity, free
            of cost), or None; of any floating dtype.
        norm_weight: [D_in]; LayerNorm precedes the down-projection iff it is given.
        norm_bias: [D_in] or None.
        norm_eps: added to the variance; finite, not negative.
        dropout: probability of dropping an element of h, where ``training``; the mask follows
            from a seed drawn from PyTorch's generator, or is PyTorch's own where ``auto`` runs in
            plain PyTorch.
        input_dropout: the same of what the down-projection is given, behind LayerNorm.
        training: whether dropout is active.

    Products are in the compute dtype: that of autocast where it is on, else that of x. An fp32 x
    and parameters of another dtype are rounded to it on their way in; sums, LayerNorm and the
    addition of the residual are in fp32. Each gradient has the dtype of what it is of.

    Returns:
        y: contiguous, [..., D_out], in the wider dtype of residual and products (and, under
            autocast, of a tensor as scale), as PyTorch gives for the sum.

    Raises:
        TypeError, ValueError: naming the argument, the shape expected and the shape given.
        RuntimeError: a backend chosen by name cannot run.

    Examples:
        >>> x = torch.randn(2, 197, 768)
        >>> down, up = torch.randn(64, 768), torch.zeros(768, 64)
        >>> torch.equal(bottleneck(x, down, up, residual=x), x)
        True
        >>> frozen, wide = torch.randn(2, 197, 3072), torch.zeros(3072, 64)
        >>> y = bottleneck(
        ...     x, down, wide, activation="identity", scale=2.0, residual=frozen,
        ...     input_dropout=0.05, training=True,
        ... )
        >>> torch.equal(y, frozen)
        True
    """
    if isinstance(x, Proxy):
        return leaf(bottleneck, locals())
    sharded = (
        None
        if type(x) in backends.PLAIN_TYPES
        else on_shards(bottleneck, locals(), ("x", "residual"), 1)
    )
    if sharded is not None and not isinstance(sharded, str):
        return sharded
    scale = check_bottleneck(
        x, down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias, residual
    )
    norm_eps, dropout, input_dropout = check_options(
        activation, norm_eps, training, dropout, input_dropout
    )
    dtype, out = compute_and_out_dtype(x, residual, scale)
    others = (
        residual, down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias,
    )  # fmt: skip
    (r, d_in), d_out = down_weight.shape, up_weight.shape[0]
    problem = backends.Problem(
        max(d_in, d_out), r, dtype, out, others, sharded,
    )  # fmt: skip
    name = backends.resolve("bottleneck", x, problem)
    if name in PLAIN:
        side = BottleneckParameters(
            down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias
        )
        return plain_bottleneck(
            name, x, side, residual, dtype, out,
            activation=activation, norm_eps=norm_eps, dropout=dropout,
            input_dropout=input_dropout, seed=plain_seed(x, dropout, input_dropout),
        )  # fmt: skip
    seed = draw_seed(x, dropout, input_dropout)
    x, residual, add_x = storage(x, residual, dtype, out)
    learnable, scale_value = split_scale(scale)
    tensors = (
        readable(x), None if residual is None else readable(residual),
        parameter(down_weight, dtype), parameter(down_bias, dtype), parameter(up_weight, dtype),
        parameter(up_bias, dtype), parameter(norm_weight, dtype), parameter(norm_bias, dtype),
        parameter(learnable, dtype), seed,
    )  # fmt: skip
    y: Tensor = autograd.call(
        NAMESPACES[name].bottleneck_forward.default, tensors,
        (scale_value, norm_eps, dropout, input_dropout, ACTIVATION_CODES[activation],
         DTYPE_CODES[dtype], DTYPE_CODES[out], add_x, saves(tensors)),
    )  # fmt: skip
    return y

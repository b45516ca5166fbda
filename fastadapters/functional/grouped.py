"""A bottleneck for each item, or each token, of N adapters: checks, dtypes, choice of backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from .. import backends
from ..checks import check_floats, check_ndim, check_number, check_residual, check_tensor
from ..ops import NAMESPACES, autograd
from ..ops.codes import ACTIVATION_CODES, DTYPE_CODES
from ..options import Activation
from .arguments import (
    PLAIN,
    compute_and_out_dtype,
    draw_seed,
    leaf,
    plain_seed,
    readable,
    saves,
    without_autocast,
)
from .bottleneck import (
    BottleneckParameters,
    cast_parameters,
    check_options,
    read_parameters,
    storage,
)
from .shards import on_shards


def _check_parameters(
    x: Tensor, stack: BottleneckParameters, residual: Tensor | None
) -> float | Tensor:
    """x, a residual and stacked parameters must fit; the scale, a number as a float."""
    check_floats("x", x, "[B, ..., D_in]")
    if x.dim() < 2 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [B, ..., D_in] with D_in >= 1, got {list(x.shape)}")
    weight = stack.down_weight
    check_ndim("down_weight", weight, "[N, r, D_in]", 3)
    n, r, d, device = *weight.shape[:2], x.shape[-1], x.device
    check_tensor("down_weight", weight, "[N, r, D_in]", (n, r, d), device)
    check_ndim("up_weight", stack.up_weight, "[N, D_out, r]", 3)
    out = stack.up_weight.shape[1]
    check_tensor("up_weight", stack.up_weight, "[N, D_out, r]", (n, out, r), device)
    if stack.norm_bias is not None and stack.norm_weight is None:
        raise ValueError("norm_bias: expected None without norm_weight, got a tensor")
    for name, symbols, shape in (
        ("down_bias", "[N, r]", (n, r)),
        ("up_bias", "[N, D_out]", (n, out)),
        ("norm_weight", "[N, D_in]", (n, d)),
        ("norm_bias", "[N, D_in]", (n, d)),
    ):
        t = getattr(stack, name)
        if t is not None:
            check_tensor(name, t, symbols, shape, device)
    check_residual(residual, x, out)
    scale = stack.scale
    if not isinstance(scale, Tensor):
        return check_number("scale", scale, " or a tensor")
    if scale.dim() == 1:
        check_tensor("scale", scale, "[N]", (n,), device)
    else:
        check_tensor("scale", scale, "[N] or [N, D_out]", (n, out), device)
    return scale


def _check_index(index: Tensor, x: Tensor, n: int) -> Tensor:
    """An adapter for each of the leading dimensions of x; as contiguous int64.

    Values are looked at on the CPU only: elsewhere that would wait for the device.
    """
    if not isinstance(index, Tensor):
        raise TypeError(f"index: expected a tensor of int64 or int32, got {type(index).__name__}")
    if index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"index: expected int64 or int32, got {index.dtype}")
    if not 1 <= index.dim() < x.dim() or index.shape != x.shape[: index.dim()]:
        raise ValueError(
            f"index: expected leading dimensions of x {list(x.shape)}, [B] or more of them,"
            f" got {list(index.shape)}"
        )
    if index.device != x.device:
        raise ValueError(f"index: expected a tensor on {x.device} like x, got {index.device}")
    looked_at = (
        index.device.type == "cpu"
        and index.numel() > 0
        and not torch.compiler.is_compiling()
        and type(index) is Tensor
        and not torch._C._are_functorch_transforms_active()
    )
    if looked_at:
        least, most = map(int, index.aminmax())
        if least < 0 or most >= n:
            raise ValueError(
                f"index: expected values in [0, N) = [0, {n}), got {least if least < 0 else most}"
            )
    return index.to(torch.int64).contiguous()


def grouped_bottleneck(
    x: Tensor,
    index: Tensor,
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
    """N adapters in one batch: each item, or each token, goes through the one that it names.

        y[b] = bottleneck(x[b], the parameters of adapter index[b])

    Args:
        x: [B, ..., D_in], any strides; dtypes as in `bottleneck`.
        index: int64 or int32, in [0, N): the adapter of each item [B], of each token [B, T], or of
            whatever the leading dimensions of x are that it has.
        down_weight, up_weight: [N, r, D_in] and [N, D_out, r].
        down_bias, up_bias: [N, r] and [N, D_out], or None.
        scale: a number, or a learnable tensor [N] (one per adapter) or [N, D_out] (per channel).
        norm_weight, norm_bias: [N, D_in], or None.
        activation, residual, norm_eps, dropout, input_dropout, training: as in `bottleneck`; the
            masks of dropout depend on the place of a row in x, not on its adapter.

    Only adapters that occur are worked on; the gradients of all others are exact zeros.

    On a GPU the values of ``index`` are not looked at, which would wait for it: rows for which it
    names no adapter become NaN. On the CPU they are, before anything runs.

    Returns:
        y: as `bottleneck`.

    Raises:
        TypeError, ValueError: naming the argument, the shape expected and the shape given.
        RuntimeError: a backend chosen by name cannot run.

    Examples:
        >>> down, up = torch.randn(3, 64, 768), torch.randn(3, 768, 64)
        >>> x, index = torch.randn(4, 197, 768), torch.tensor([2, 0, 2, 2])
        >>> grouped_bottleneck(x, index, down, up, residual=x).shape
        torch.Size([4, 197, 768])
    """
    if isinstance(x, Proxy):
        return leaf(grouped_bottleneck, locals())
    sharded = (
        on_shards(grouped_bottleneck, locals(), ("x", "index", "residual"), x.dim() - index.dim())
        if type(x) not in backends.PLAIN_TYPES
        and isinstance(x, Tensor)
        and isinstance(index, Tensor)
        else None
    )
    if sharded is not None and not isinstance(sharded, str):
        return sharded
    stack = BottleneckParameters(
        down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias
    )
    scale = _check_parameters(x, stack, residual)
    stack = stack._replace(scale=scale)
    norm_eps, dropout, input_dropout = check_options(
        activation, norm_eps, training, dropout, input_dropout
    )
    (n, r, d_in), d_out = down_weight.shape, up_weight.shape[1]
    index = _check_index(index, x, n)
    compute, out = compute_and_out_dtype(x, residual, scale)
    problem = backends.Problem(
        max(d_in, d_out), r, compute, out, (residual, index, *stack), sharded, adapters=n,
        entries=index.numel(),
    )  # fmt: skip
    name = backends.resolve("bottleneck", x, problem)
    options: dict[str, Any] = {
        "activation": activation, "norm_eps": norm_eps, "dropout": dropout,
        "input_dropout": input_dropout,
    }  # fmt: skip
    return run(name, x, index, stack, residual, compute, out, **options)


def run(
    name: str,
    x: Tensor,
    index: Tensor,
    stack: BottleneckParameters,
    residual: Tensor | None,
    compute: torch.dtype,
    out: torch.dtype,
    *,
    activation: Activation,
    norm_eps: float,
    dropout: float,
    input_dropout: float = 0.0,
) -> Tensor:
    """`grouped_bottleneck` on backend ``name``, of arguments that have been checked."""
    if name in PLAIN:
        with without_autocast(x):
            plain: Tensor = PLAIN[name].grouped_bottleneck(
                x, index, **cast_parameters(stack, x, compute), residual=residual,
                compute_dtype=compute, seed=plain_seed(x, dropout, input_dropout),
                activation=activation, norm_eps=norm_eps, dropout=dropout,
                input_dropout=input_dropout,
            )  # fmt: skip
        return plain.to(out)
    seed = draw_seed(x, dropout, input_dropout)
    x, residual, add_x = storage(x, residual, compute, out)
    parameters, scale_value = read_parameters(stack, compute)
    tensors = (
        readable(x), None if residual is None else readable(residual),
        *parameters, seed, index,
    )  # fmt: skip
    y: Tensor = autograd.call(
        NAMESPACES[name].grouped_forward.default, tensors,
        (scale_value, norm_eps, dropout, input_dropout, ACTIVATION_CODES[activation],
         DTYPE_CODES[compute], DTYPE_CODES[out], add_x, saves(tensors)),
    )  # fmt: skip
    return y

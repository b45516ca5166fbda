"""The bottleneck as PyTorch operators: schemas, fake kernels, autograd.

``bottleneck_forward`` and ``bottleneck_backward`` allocate their results; the ``_out`` forms fill
tensors given by the caller, strided slices included. The schemas are defined here, so that they
exist with or without the compiled library, which only adds kernels to them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, eager
from . import autograd, schemas
from .codes import ACTIVATION_NAMES, DTYPES
from .flops import Formula

PARAMETERS = (
    "down_weight",
    "down_bias",
    "up_weight",
    "up_bias",
    "norm_weight",
    "norm_bias",
    "scale",
)


def declare(suffix: str = "") -> str:
    """The schema of one adapter's tensors: its parameters and the dropout seed."""
    optional = (name not in ("down_weight", "up_weight") for name in PARAMETERS)
    tensors = (f"Tensor{'?' * o} {n}{suffix}" for n, o in zip(PARAMETERS, optional, strict=True))
    return f"{', '.join(tensors)}, Tensor? seed{suffix}"


# x has the dtype of the products, compute_dtype, or is in fp32; so has y, of out_dtype.
CODES = "int activation, int compute_dtype, int out_dtype, bool add_x"
OPTIONS = f"float norm_eps, float dropout, float input_dropout, {CODES}"
_INPUTS = f"{declare()}, float scale_value, {OPTIONS}"
_GRADIENTS = ("dx", *(f"d_{name}" for name in PARAMETERS))
_GRADIENTS_OUT = ", ".join(f"Tensor({chr(97 + i)}!)? {n}" for i, n in enumerate(_GRADIENTS))

SCHEMAS = {
    "bottleneck_forward": f"(Tensor x, Tensor? residual, {_INPUTS}, bool save)"
    " -> (Tensor y, Tensor z, Tensor stats)",
    "bottleneck_backward": f"(Tensor dy, Tensor x, Tensor z, Tensor stats, {_INPUTS}, int needs)"
    f" -> ({', '.join(f'Tensor {name}' for name in _GRADIENTS)})",
    "bottleneck_forward_out": "(Tensor(a!) y, Tensor(b!)? z, Tensor(c!)? stats, Tensor x,"
    f" Tensor? residual, {_INPUTS}) -> ()",
    "bottleneck_backward_out": f"({_GRADIENTS_OUT}, Tensor dy, Tensor x, Tensor? z,"
    f" Tensor? stats, {_INPUTS}) -> ()",
}


def allocate_result(x: Tensor, up_weight: Tensor, out_dtype: int) -> Tensor:
    """y, with the rows of x and as many columns as the up-projections have."""
    return x.new_empty((*x.shape[:-1], up_weight.shape[-2]), dtype=DTYPES[out_dtype])


def allocate_saved(
    x: Tensor, down_weight: Tensor, norm_weight: Tensor | None, compute_dtype: int, save: bool
) -> tuple[Tensor, Tensor]:
    """z [M, r] and stats [M, 2], or empty.

    On GPUs there is no z behind LayerNorm, whose gradient reads x: they make z of it once more.
    """
    m, r = math.prod(x.shape[:-1]), down_weight.shape[-2]
    z_shape = (m, r) if save and (x.device.type == "cpu" or norm_weight is None) else (0,)
    z = x.new_empty(z_shape, dtype=DTYPES[compute_dtype])
    stats_shape = (m, 2) if save and norm_weight is not None else (0,)
    return z, x.new_empty(stats_shape, dtype=torch.float32)


def allocate_gradients(
    dy: Tensor, x: Tensor, parameters: Sequence[Tensor | None], needs: int
) -> tuple[Tensor, ...]:
    """dx and a gradient for each parameter whose bit is set in ``needs``; empty tensors else.

    dx has the rows of dy and the columns of Wd: x is empty where no gradient needs its values.
    """
    down_weight = parameters[0]
    dx = x.new_empty(0)
    if needs & 1 and down_weight is not None:
        dx = x.new_empty((*dy.shape[:-1], down_weight.shape[-1]))

    def allocate(i: int, like: Tensor | None) -> Tensor:
        if like is not None and needs >> i & 1:
            return like.new_empty(like.shape)
        return x.new_empty(0)

    return dx, *(allocate(i, like) for i, like in enumerate(parameters, 1))


def asked_for(
    gradients: Sequence[Tensor], parameters: Sequence[Tensor | None], needs: int
) -> list[Tensor | None]:
    """What `allocate_gradients` gave, with None in place of what is not to be computed."""
    absent = (False, *(p is None for p in parameters))
    pairs = enumerate(zip(gradients, absent, strict=True))
    return [g if needs >> i & 1 and not gone else None for i, (g, gone) in pairs]


@functools.cache
def reads_of_adapter(
    needs: tuple[bool, ...], norm: bool, saved_z: bool
) -> tuple[tuple[bool, bool, bool], tuple[bool, ...]]:
    """Whether a gradient reads x, z and stats, and whether each of the parameters and the seed.

    Args:
        needs: whether x and each of `PARAMETERS` need a gradient.
        norm: whether LayerNorm precedes.
        saved_z: whether the forward saved z, which otherwise is computed again.
    """
    x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, scale = needs
    d_normed = x or norm_weight or norm_bias
    d_z = d_normed or down_weight or down_bias
    z = d_z or up_weight or scale
    again = z and not saved_z
    values = down_weight or norm_weight or (norm and x) or again
    through_norm = norm and (d_normed or down_weight)  # by z less what the biases have put in it
    parameters = (
        d_normed or again,
        through_norm or again,
        d_z or scale,
        scale,
        through_norm or again,
        through_norm or again,
        d_z or up_weight or up_bias,
    )
    return (values, z, norm and values), (*parameters, z)


def _reads(
    needs: tuple[bool, ...], tensors: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[bool]:
    norm = tensors[2 + PARAMETERS.index("norm_weight")] is not None
    of_x, of_parameters = reads_of_adapter((needs[0], *needs[2:-1]), norm, outputs[1].dim() == 2)
    return *of_x, *of_parameters


def fake_forward(
    x: Tensor, residual: Tensor | None, down_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    up_weight, norm_weight = rest[1], rest[3]
    compute_dtype, out_dtype, _, save = rest[-4:]
    y = allocate_result(x, up_weight, out_dtype)
    return y, *allocate_saved(x, down_weight, norm_weight, compute_dtype, save)


def fake_backward(
    dy: Tensor, x: Tensor, z: Tensor, stats: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return allocate_gradients(dy, x, rest[: len(PARAMETERS)], rest[-1])


_FAKES: dict[str, Callable[..., Any]] = {
    "bottleneck_forward": fake_forward,
    "bottleneck_backward": fake_backward,
    "bottleneck_forward_out": lambda *args: None,
    "bottleneck_backward_out": lambda *args: None,
}


def _eager_forward(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a program exported elsewhere runs where there is no kernel; inference only."""
    n = len(PARAMETERS)
    tensors = dict(zip(PARAMETERS, rest[:n], strict=True))
    seed, scale_value, norm_eps, dropout, input_dropout, *codes, add_x, save = rest[n:]
    activation, compute, out = codes
    if save:
        raise RuntimeError(
            f"{schemas.COMPILED}::bottleneck_forward has no kernel here that can train: "
            f"{backends.library_error or f'none for {x.device.type} tensors'}"
        )
    scale = tensors.pop("scale")
    dtype = DTYPES[compute]
    cast: dict[str, Any] = {
        n: t if t is None else t.to(x.dtype if n.startswith("norm") else dtype)
        for n, t in tensors.items()
    }
    y = eager.bottleneck(
        x,
        **cast,
        activation=ACTIVATION_NAMES[activation],
        scale=scale_value if scale is None else scale.to(dtype),
        residual=x if add_x else residual,
        compute_dtype=dtype,
        norm_eps=norm_eps,
        dropout=0.0 if seed is None else dropout,
        input_dropout=0.0 if seed is None else input_dropout,
        seed=seed,
    )
    empty = x.new_empty(0, dtype=dtype)
    return y.to(DTYPES[out]), empty, x.new_empty(0, dtype=torch.float32)


_BITS = {name: 1 << i for i, name in enumerate(("x", *PARAMETERS))}


def _any_of(needs: int, *names: str) -> bool:
    return any(needs & _BITS[name] for name in names)


def flops_of_gradients(rows: int, d_in: int, d_out: int, r: int, needs: int, has_z: bool) -> int:
    """FLOPs of the gradients whose bits are set in ``needs``, of one adapter on ``rows`` rows."""
    down = (
        not has_z and needs & ~_BITS["up_bias"] != 0,  # z again
        _any_of(needs, "down_weight"),
        _any_of(needs, "x", "norm_weight", "norm_bias"),  # dz Wd
    )
    up = (
        needs & ~(_BITS["up_weight"] | _BITS["up_bias"]) != 0,  # dy Wu
        _any_of(needs, "up_weight"),
    )
    return 2 * rows * r * (d_in * sum(down) + d_out * sum(up))


def widths(a: Mapping[str, Any], suffix: str = "") -> tuple[int, int, int]:
    """(D_in, D_out, r) of a call's adapter, or of its stacked adapters."""
    r, d_in = a[f"down_weight{suffix}"].shape[-2:]
    return int(d_in), int(a[f"up_weight{suffix}"].shape[-2]), int(r)


def flops_of_forward(a: Mapping[str, Any]) -> int:
    """FLOPs of the forward of each row of x through an adapter."""
    d_in, d_out, r = widths(a)
    return 2 * int(math.prod(a["x"].shape[:-1])) * r * (d_in + d_out)


def flops_of_backward(a: Mapping[str, Any]) -> int:
    if "needs" in a:
        needs = a["needs"]
    else:
        given = {"x": a["dx"]} | {name: a[f"d_{name}"] for name in PARAMETERS}
        needs = sum(_BITS[name] for name, t in given.items() if t is not None)
    has_z = a["z"] is not None and a["z"].dim() == 2
    return flops_of_gradients(math.prod(a["dy"].shape[:-1]), *widths(a), needs, has_z)


FLOPS: dict[str, Formula] = {
    "bottleneck_forward": flops_of_forward,
    "bottleneck_forward_out": flops_of_forward,
    "bottleneck_backward": flops_of_backward,
    "bottleneck_backward_out": flops_of_backward,
}


def define(library: torch.library.Library) -> None:
    """Declare the ops in ``library`` (schemas, fake kernels, autograd), without kernels."""
    schemas.define(library, SCHEMAS, _FAKES)
    ops = getattr(torch.ops, library.ns)

    def backward(ctx: Any, needs: Sequence[bool], dy: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_residual, *need, _ = needs
        op = ops.bottleneck_backward.default
        dx, *others = autograd.gradients(op, ctx, (dy,), (need_x, *need))
        return dx, dy if need_residual else None, *others, None

    autograd.register(library, "bottleneck_forward", backward, _reads)


def define_fallback(library: torch.library.Library) -> None:
    """Let the forward run eagerly on the devices that ``library`` has no kernel for."""
    for key in ("CPU", "CUDA"):
        if not backends.has_kernel("bottleneck_forward", key):
            library.impl("bottleneck_forward", _eager_forward, key)

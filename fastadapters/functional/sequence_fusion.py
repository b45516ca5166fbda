"""Low-rank fusion of token sequences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast, get_args

import torch
from torch import Tensor
from torch.fx import Proxy

from .. import backends
from ..checks import (
    check_activations,
    check_choice,
    check_fits,
    check_list,
    check_ndim,
    check_tensor,
)
from ..ops import NAMESPACES, autograd
from ..ops.codes import ACTIVATION_CODES, DTYPE_CODES
from ..options import Activation, Fusion, Leading
from ..reference.sequence_fusion import leading_tokens
from .arguments import PLAIN, compute_dtype, leaf, parameter, readable, saves, without_autocast
from .shards import on_shards

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def sequence_fusion(
    inputs: Sequence[Tensor],
    down_weights: Sequence[Tensor],
    down_biases: Sequence[Tensor | None],
    time_factors: Sequence[Tensor],
    feature_factors: Sequence[Tensor],
    *,
    activation: Activation = "gelu",
    residual: Tensor | Leading | None = None,
    lengths: Sequence[Tensor | None] | Tensor | None = None,
    fusion: Fusion = "cp",
) -> Tensor:
    """Low-rank fusion of any number M of token sequences (Wander, arXiv 2412.08979).

        H_m = activation(x_m Wd_m^T + b_m)                     [B, T_m, r]
        y = residual + sum_q prod_m A_mq^T H_m U_mq            [B, T_o, D]    q = 1 .. R

    Args:
        inputs: M tensors x_m [B, T_m, D_m]; the first one's dtype is the op's. M, T_m, D_m >= 1;
            more than 8 run eagerly.
        down_weights: M tensors Wd_m [r_m, D_m].
        down_biases: M tensors b_m [r_m], or None in a modality's place.
        time_factors: M tensors A_m [R, T, T_o], T >= T_m: of the others the first T_m rows count.
        feature_factors: M tensors U_m [R, r_m, D].
        activation: as in `bottleneck`.
        residual: [B, T_o, D], or "leading": the first T_o of all tokens laid end to end, where the
            widths D_m of those it reaches are D; or None.
        lengths: M tensors [B] of integers, or None in a modality's place, or all as one tensor
            [M, B]: how many of an item's tokens count. The others are as if they were not there,
            forward and backward; a leading residual takes those that count, zeros where there are
            no more. Below 0 means none, beyond T_m all.
        fusion: "cp", as above, or "summed": the factors are summed over their ranks, which may
            differ between A and U, before they are multiplied, as in the published module.

    Parameters of another floating dtype than the inputs are rounded to it on the way in; each
    gradient has its parameter's dtype.

    Returns:
        y [B, T_o, D], contiguous, in the wider dtype of residual and products, as PyTorch gives for
        the sum; that of the products is the one of autocast where it is on, else that of x_1.

    Raises:
        TypeError, ValueError: naming the argument, the shape expected and the shape given.
        RuntimeError: a backend chosen by name cannot run.

    Examples:
        >>> words, frames = torch.randn(8, 50, 300), torch.randn(8, 375, 35)
        >>> sequence_fusion(
        ...     [words, frames],
        ...     [torch.randn(16, 300), torch.randn(16, 35)],
        ...     [None, None],
        ...     [torch.randn(4, 50, 20), torch.randn(4, 375, 20)],
        ...     [torch.randn(4, 16, 40), torch.randn(4, 16, 40)],
        ...     lengths=[None, torch.tensor([375, 200, 120, 90, 300, 60, 0, 375])],
        ... ).shape
        torch.Size([8, 20, 40])
    """
    inputs = check_list("inputs", inputs, "tensors [B, T, D]")
    if any(isinstance(x, Proxy) for x in inputs):
        return cast(Tensor, leaf(sequence_fusion, locals()))
    down_weights = check_list("down_weights", down_weights, "tensors [r, D]")
    down_biases = check_list("down_biases", down_biases, "tensors [r] or None")
    time_factors = check_list("time_factors", time_factors, "tensors [R, T, T_o]")
    feature_factors = check_list("feature_factors", feature_factors, "tensors [R, r, D]")
    sharded = (
        None
        if all(type(x) in backends.PLAIN_TYPES for x in inputs)
        else on_shards(sequence_fusion, locals(), ("inputs", "residual", "lengths"), 2)
    )
    if sharded is not None and not isinstance(sharded, str):
        return sharded
    residual, lengths = _check(
        inputs, down_weights, down_biases, time_factors, feature_factors, activation, residual,
        lengths, fusion,
    )  # fmt: skip
    return _dispatch(
        inputs, down_weights, down_biases, time_factors, feature_factors, activation, residual,
        lengths, fusion, sharded,
    )  # fmt: skip


def _check(
    inputs: Sequence[Tensor],
    down_weights: Sequence[Tensor],
    down_biases: Sequence[Tensor | None],
    time_factors: Sequence[Tensor],
    feature_factors: Sequence[Tensor],
    activation: Activation,
    residual: Tensor | Leading | None,
    lengths: Sequence[Tensor | None] | Tensor | None,
    fusion: Fusion,
) -> tuple[Tensor | Leading | None, Tensor | None]:
    """All arguments must fit; the residual, and the lengths as one tensor [M, B] of int64."""
    modalities = len(inputs)
    if modalities == 0:
        raise ValueError("inputs: expected at least one tensor, got none")
    for name, group in (
        ("down_weights", down_weights),
        ("down_biases", down_biases),
        ("time_factors", time_factors),
        ("feature_factors", feature_factors),
    ):
        if len(group) != modalities:
            raise ValueError(f"{name}: expected M = {modalities} tensors, got {len(group)}")
    for i, x in enumerate(inputs):
        check_activations(f"inputs[{i}]", x, "[B, T, D]", 3)
    check_ndim("time_factors[0]", time_factors[0], "[R, T, T_o]", 3)
    check_ndim("feature_factors[0]", feature_factors[0], "[R, r, D]", 3)
    check_choice("fusion", fusion, get_args(Fusion))
    check_choice("activation", activation, ACTIVATION_CODES)
    n_items, device = inputs[0].shape[0], inputs[0].device
    (time_rank, _, out_len), (rank, _, d) = time_factors[0].shape, feature_factors[0].shape
    if fusion == "cp":
        time_rank = rank
    for i, (x, weight, constant, time, feature) in enumerate(
        zip(inputs, down_weights, down_biases, time_factors, feature_factors, strict=True)
    ):
        items, n_tokens, n_columns = x.shape
        if items != n_items or x.device != device:
            check_fits(f"inputs[{i}]", x, "[B, T, D]", (n_items, n_tokens, n_columns), device)
        check_ndim(f"down_weights[{i}]", weight, "[r, D]", 2)
        width, columns = weight.shape
        if columns != n_columns or weight.device != device:
            check_fits(f"down_weights[{i}]", weight, "[r, D]", (width, n_columns), device)
        if constant is not None:
            check_tensor(f"down_biases[{i}]", constant, "[r]", (width,), device)
        check_ndim(f"time_factors[{i}]", time, "[R, T, T_o]", 3)
        ranks, rows, length = time.shape
        if ranks != time_rank or rows < n_tokens or length != out_len or time.device != device:
            shape = (time_rank, max(n_tokens, rows), out_len)
            check_fits(f"time_factors[{i}]", time, "[R, T, T_o]", shape, device)
        check_tensor(f"feature_factors[{i}]", feature, "[R, r, D]", (rank, width, d), device)
    if isinstance(residual, str):
        check_choice("residual", residual, get_args(Leading))
        missing = out_len
        for i, x in enumerate(inputs):
            if missing > 0 or lengths is not None:
                shape = (n_items, x.shape[1], d)
                check_tensor(f"inputs[{i}]", x, "[B, T, D] of a leading residual", shape, device)
            missing -= x.shape[1]
        if missing > 0:
            raise ValueError(
                f"residual: expected T_o = {out_len} tokens to lead, got {out_len - missing}"
            )
    elif residual is not None:
        check_tensor("residual", residual, "[B, T_o, D]", (n_items, out_len, d), device)
    return residual, stack_lengths(inputs, lengths)


def stack_lengths(
    inputs: Sequence[Tensor], lengths: Sequence[Tensor | None] | Tensor | None
) -> Tensor | None:
    """Lengths as one tensor [M, B] of int64."""
    if lengths is None:
        return None
    (n_items, *_), device = inputs[0].shape, inputs[0].device
    if not isinstance(lengths, Tensor):
        lengths = check_list("lengths", lengths, "tensors [B] or None")
        if len(lengths) != len(inputs):
            raise ValueError(
                f"lengths: expected M = {len(inputs)} tensors or None, got {len(lengths)}"
            )
        each = []
        for i, (x, length) in enumerate(zip(inputs, lengths, strict=True)):
            if length is None:
                length = torch.full((n_items,), x.shape[1], device=device)
            each.append(_integers(f"lengths[{i}]", length, "[B]", (n_items,), device))
        return None if all(length is None for length in lengths) else torch.stack(each)
    return _integers("lengths", lengths, "[M, B]", (len(inputs), n_items), device).contiguous()


def _integers(
    name: str, value: object, symbols: str, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype not in _INTEGERS:
        given = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a tensor {symbols} of integers, got {given}")
    if tuple(value.shape) != shape or value.device != device:
        raise ValueError(
            f"{name}: expected {symbols} = {list(shape)} on {device}, got {list(value.shape)} on"
            f" {value.device}"
        )
    return value.to(torch.int64)


def _dispatch(
    inputs: list[Tensor],
    down_weights: list[Tensor],
    down_biases: list[Tensor | None],
    time_factors: list[Tensor],
    feature_factors: list[Tensor],
    activation: Activation,
    residual: Tensor | Leading | None,
    lengths: Tensor | None,
    fusion: Fusion,
    refusal: str | None,
) -> Tensor:
    first, (_, _, out_len) = inputs[0], time_factors[0].shape
    dtype = out = compute_dtype(first)
    if isinstance(residual, str):
        for x in inputs:
            if x.dtype != out:
                out = torch.promote_types(out, x.dtype)
    elif residual is not None:
        out = torch.promote_types(out, residual.dtype)
    groups = (inputs, down_weights, down_biases, time_factors, feature_factors)
    given = None if isinstance(residual, str) else residual
    others = (given, lengths, *itertools.chain(*groups))
    r, d = max([weight.shape[0] for weight in down_weights]), feature_factors[0].shape[2]
    if len(inputs) > 8:
        refusal = f"it takes 8 modalities, not {len(inputs)}"
    rows = first.shape[0] * max(out_len, *[x.shape[1] for x in inputs])
    sizes = rows, max(d, *[x.shape[2] for x in inputs])
    problem = backends.Problem(d, r, dtype, out, others, refusal, sizes)
    name = backends.resolve("sequence_fusion", first, problem)
    if name in PLAIN:
        if isinstance(residual, str):
            residual = leading_tokens(inputs, out_len, lengths)
        with without_autocast(first):
            y: Tensor = PLAIN[name].sequence_fusion(
                *([None if t is None else t.to(dtype) for t in group] for group in groups),
                activation=activation, residual=residual, lengths=lengths, fusion=fusion,
            )  # fmt: skip
        return y.to(out)
    add_leading = isinstance(residual, str)
    inputs = [x if x.dtype in (dtype, torch.float32) else x.to(dtype) for x in inputs]
    if isinstance(residual, str):
        if all(x.dtype == out for x in inputs):
            residual = None
        else:
            residual, add_leading = leading_tokens(inputs, out_len, lengths), False
    tensors = (
        [readable(x) for x in inputs],
        None if residual is None else readable(residual.to(out)),
        [parameter(t, dtype) for t in down_weights],
        [first.new_empty(0) if t is None else parameter(t, dtype) for t in down_biases],
        [parameter(t, dtype) for t in time_factors],
        [parameter(t, dtype) for t in feature_factors],
        lengths,
    )
    y = autograd.call(
        NAMESPACES[name].sequence_fusion_forward.default, tensors,
        (ACTIVATION_CODES[activation], DTYPE_CODES[dtype], DTYPE_CODES[out], fusion == "summed",
         add_leading, saves(others)),
    )  # fmt: skip
    return y

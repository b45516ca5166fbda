"""Low-rank fusion of token sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor
from torch.fx import Proxy

from .. import backends
from ..checks import check_activations, check_choice, check_ndim, check_tensor
from ..ops.codes import ACTIVATION_CODES
from .arguments import PLAIN, compute_dtype, leaf, without_autocast


def sequence_fusion(
    inputs: Sequence[Tensor],
    down_weights: Sequence[Tensor],
    down_biases: Sequence[Tensor | None],
    time_factors: Sequence[Tensor],
    feature_factors: Sequence[Tensor],
    *,
    activation: str = "gelu",
    residual: Tensor | None = None,
) -> Tensor:
    """Low-rank fusion of any number M of token sequences (Wander, arXiv 2412.08979).

        H_m = activation(x_m Wd_m^T + b_m)                     [B, T_m, r]
        y = residual + sum_q prod_m A_mq^T H_m U_mq            [B, T_o, D]    q = 1 .. R

    Args:
        inputs: M tensors x_m [B, T_m, D_m]; the first one's dtype is the op's. M, T_m, D_m >= 1.
        down_weights: M tensors Wd_m [r_m, D_m].
        down_biases: M tensors b_m [r_m], or None in a modality's place.
        time_factors: M tensors A_m [R, T_m, T_o].
        feature_factors: M tensors U_m [R, r_m, D].
        activation: as in `bottleneck`.
        residual: [B, T_o, D] or None.

    R = 1 with factors summed over their ranks beforehand is the published module. Parameters of
    another floating dtype than the inputs are rounded to it on the way in; each gradient has its
    parameter's dtype.

    Returns:
        y [B, T_o, D] in the compute dtype.

    Raises:
        TypeError, ValueError: naming the argument, the shape expected and the shape given.
        RuntimeError: a backend chosen by name cannot run.
    """
    if any(isinstance(x, Proxy) for x in inputs):
        return cast(Tensor, leaf(sequence_fusion, locals()))
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
    first, device = inputs[0], inputs[0].device
    (rank, _, length), d = time_factors[0].shape, feature_factors[0].shape[2]
    for i, x in enumerate(inputs):
        check_tensor(f"inputs[{i}]", x, "[B, T, D]", (first.shape[0], *x.shape[1:]), device)
        check_ndim(f"down_weights[{i}]", down_weights[i], "[r, D]", 2)
        width = down_weights[i].shape[0]
        check_tensor(f"down_weights[{i}]", down_weights[i], "[r, D]", (width, x.shape[2]), device)
        constant = down_biases[i]
        if constant is not None:
            check_tensor(f"down_biases[{i}]", constant, "[r]", (width,), device)
        check_tensor(
            f"time_factors[{i}]", time_factors[i], "[R, T, T_o]", (rank, x.shape[1], length), device
        )
        check_tensor(
            f"feature_factors[{i}]", feature_factors[i], "[R, r, D]", (rank, width, d), device
        )
    if residual is not None:
        check_tensor("residual", residual, "[B, T_o, D]", (first.shape[0], length, d), device)
    check_choice("activation", activation, ACTIVATION_CODES)

    dtype = compute_dtype(first)
    backend = PLAIN[backends.resolve("sequence_fusion", first)]
    groups = (
        [None if t is None else t.to(dtype) for t in group]
        for group in (inputs, down_weights, down_biases, time_factors, feature_factors)
    )
    with without_autocast(first):
        y: Tensor = backend.sequence_fusion(
            *groups, activation=activation,
            residual=None if residual is None else residual.to(dtype),
        )  # fmt: skip
    return y

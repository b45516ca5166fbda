"""The CPU kernels of one instruction set, called as the ops they are, without autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bottleneck_cases import DTYPES, Case, inputs, reference_pair
from compare import check_all
from hooks import load
from torch import Tensor

from fastadapters.ops.bottleneck import PARAMETERS
from fastadapters.ops.codes import ACTIVATION_CODES, DTYPE_CODES

ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")
OWN_KERNELS = [
    (isa, dtype)
    for isa in ISAS
    for dtype in ([torch.bfloat16] if isa in ("amx", "avx512_bf16") else DTYPES)
]


def choose(isa: str) -> None:
    hooks = load()
    if isa not in hooks.cpu_isas():
        pytest.skip(f"this CPU has no {isa}")
    hooks.set_cpu_isa(isa)


def call(
    kernels: Any, case: Case, tensors: dict[str, Tensor], norm_eps: float = 1e-5
) -> dict[str, Tensor]:
    """``y`` and the gradient of every input, as `bottleneck_cases.run` gives them."""
    torch.manual_seed(7)
    seed = torch.randint(2**62, (2,)) if max(case.dropout, case.input_dropout) > 0 else None
    parameters = [tensors.get(name) for name in PARAMETERS]
    codes = DTYPE_CODES[case.dtype], DTYPE_CODES[case.out_dtype]
    activation = ACTIVATION_CODES[case.activation]
    options = (norm_eps, case.dropout, case.input_dropout, activation, *codes, case.residual == "x")
    scale_value = 0.6 if case.scale == "number" else 1.0
    x, residual = tensors["x"], tensors.get("residual")
    y, z, stats = kernels.bottleneck_forward(
        x, residual, *parameters, seed, scale_value, *options, True
    )
    gradients = kernels.bottleneck_backward(
        tensors["cotangent"], x, z, stats, *parameters, seed, scale_value, *options, 255
    )
    named = dict(zip(("x", *PARAMETERS), gradients, strict=True))
    if residual is not None:
        named["residual"] = tensors["cotangent"]
    return {"y": y, **{f"d_{name}": g for name, g in named.items() if name in tensors}}


def check_kernels(kernels: Any, case: Case) -> None:
    tensors = inputs(case)
    check_all(call(kernels, case, tensors), reference_pair(case, tensors), str(case))

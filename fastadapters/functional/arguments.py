"""What the ops do with their arguments between the checks and the choice of a backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import backends, eager, reference

# The backends that take any device and dtype, called without the dispatcher.
PLAIN: dict[str, Any] = {"reference": reference, "eager": eager}


def compute_dtype(x: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on, else that of ``x``."""
    dtype, device = x.dtype, x.device.type
    if dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """No autocast on the device of ``x``, where there is such a thing."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def readable(x: Tensor) -> Tensor:
    """x as the kernels read it: unit last stride and one to three leading dimensions."""
    return x if x.stride(-1) == 1 and 2 <= x.dim() <= 4 else x.contiguous()


def parameter(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A parameter as the kernels read it: they round the dtypes they know, float64 is not one."""
    return t if t is None or t.dtype in backends.FUSED_DTYPES else t.to(dtype)


def draw_seed(x: Tensor, dropout: float, training: bool) -> Tensor | None:
    """(key, offset) of the dropout stream, from PyTorch's generator on the device of x."""
    return torch.randint(2**62, (2,), device=x.device) if training and dropout > 0.0 else None


def saves(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a gradient may be asked for, for which the forward must save."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False

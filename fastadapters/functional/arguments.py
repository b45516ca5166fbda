"""What the ops do with their arguments between the checks and the choice of a backend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from .. import backends, eager, reference

# The backends that take any device and dtype, called without the dispatcher.
PLAIN: dict[str, Any] = {"reference": reference, "eager": eager}


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast has products of ``x`` in, if it is on and not in float64."""
    if not torch._C._is_any_autocast_enabled():
        return None
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on, else that of ``x``."""
    return autocast_dtype(x) or x.dtype


def compute_and_out_dtype(
    x: Tensor, residual: Tensor | None, *scales: float | Tensor
) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the products and of the result of `residual + scale * up(...)` in PyTorch.

    The result has the wider dtype of its terms: autocast leaves an fp32 residual stream in fp32,
    and what a learnable fp32 scale multiplies, too.
    """
    autocast = autocast_dtype(x)
    compute = out = autocast or x.dtype
    if residual is not None and residual.dtype != out:
        out = torch.promote_types(out, residual.dtype)
    if autocast is not None:
        for scale in scales:
            if isinstance(scale, Tensor) and scale.dim() > 0:
                out = torch.promote_types(out, scale.dtype)
    return compute, out


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """No autocast on the device of ``x``, where there is such a thing."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def leaf(op: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What `torch.fx.symbolic_trace` gets for ``op``, whose x is a Proxy: a node that calls it."""
    lists = (a if isinstance(a, (list, tuple)) else (a,) for a in arguments.values())
    tracer = next(t.tracer for ts in lists for t in ts if isinstance(t, Proxy))
    return tracer.create_proxy("call_function", op, (), arguments)


def owned(t: Tensor, alias: bool = False) -> Tensor:
    """t with memory of its own for each element: a copy if it is expanded, or an ``alias``."""
    if alias or any(n > 1 and stride == 0 for n, stride in zip(t.shape, t.stride(), strict=True)):
        return t.clone(memory_format=torch.contiguous_format)
    return t


def readable(x: Tensor) -> Tensor:
    """x as the kernels read it: unit last stride and one to three leading dimensions."""
    return x if x.stride(-1) == 1 and 2 <= x.dim() <= 4 else x.contiguous()


def parameter(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A parameter as the kernels read it: they round the dtypes they know, float64 is not one."""
    return t if t is None or t.dtype in backends.FUSED_DTYPES else t.to(dtype)


_stream = 0


@contextlib.contextmanager
def dropout_stream(number: int) -> Iterator[None]:
    """Other dropout masks than those of other numbers, though generators be in the same state."""
    global _stream
    previous, _stream = _stream, number
    try:
        yield
    finally:
        _stream = previous


def draw_seed(x: Tensor, *probabilities: float) -> Tensor | None:
    """(key, offset) of the dropout stream, from PyTorch's generator on the device of x.

    None where no element has a probability to be dropped.
    """
    if max(probabilities) <= 0.0:
        return None
    seed = torch.randint(2**62, (2,), device=x.device)
    return seed + _stream if _stream else seed


def plain_seed(x: Tensor, *probabilities: float) -> Tensor | None:
    """The seed for a backend in plain PyTorch.

    Random numbers in tensor ops are the definition, but slow, and no subclass of Tensor knows them:
    where nobody asked for the definition, PyTorch draws the mask.
    """
    return draw_seed(x, *probabilities) if backends.chosen_by_name() else None


def saves(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a gradient may be asked for, for which the forward must save."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False

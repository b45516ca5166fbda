"""Checks of arguments: what they raise names the argument, what was expected and what given."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Collection, Sequence
from numbers import Real
from types import NoneType
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Proxy

# What torch.compile and torch.export put in the place of an int and of a float.
_INTEGERS = (int, torch.SymInt)
# What may be sparse or nested; subclasses have ways of their own.
_DENSE = (Tensor, torch.nn.Parameter)
_STRIDED = torch.strided
_SYMBOLIC = (torch.SymFloat, torch.SymInt)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floats(name: str, value: Tensor, symbols: str) -> None:
    """``value`` must be a dense tensor of 16 to 64 bits, or of a subclass of Tensor."""
    if type(value) in _DENSE:
        if value.dtype in FLOATS and value.layout is _STRIDED and not value.is_nested:
            return
    elif isinstance(value, Tensor) and value.dtype in FLOATS:
        return
    if not isinstance(value, Tensor):
        kind = type(value).__name__
    elif value.dtype not in FLOATS:
        kind = str(value.dtype)
    else:
        kind = "a nested one" if value.is_nested else f"one of layout {value.layout}"
    raise TypeError(f"{name}: expected a floating-point tensor {symbols}, got {kind}")


def check_tensor(
    name: str, value: Tensor, symbols: str, shape: tuple[int, ...], device: torch.device
) -> None:
    """``value`` must be a floating-point tensor of ``shape`` on the ``device`` of x."""
    check_floats(name, value, symbols)
    check_fits(name, value, symbols, shape, device)


def check_fits(
    name: str, value: Tensor, symbols: str, shape: tuple[int, ...], device: torch.device
) -> None:
    """``value``, known to be a floating-point tensor, must have ``shape`` and be on ``device``."""
    if value.shape != shape:
        raise ValueError(f"{name}: expected {symbols} = {list(shape)}, got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} like x, got {value.device}")


def check_ndim(name: str, value: Tensor, symbols: str, ndim: int) -> None:
    """``value`` must be a floating-point tensor of ``ndim`` dimensions, none of size 0."""
    check_floats(name, value, symbols)
    shape = value.shape
    if len(shape) != ndim or 0 in shape:
        raise ValueError(f"{name}: expected {symbols}, none of them 0, got {list(shape)}")


def check_activations(name: str, value: Tensor, symbols: str, ndim: int) -> None:
    """``value`` must be a floating-point tensor of ``ndim`` dimensions, only the first maybe 0."""
    check_floats(name, value, symbols)
    shape = value.shape
    if len(shape) != ndim or (0 in shape and 0 in shape[1:]):
        raise ValueError(f"{name}: expected {symbols}, only B may be 0, got {list(shape)}")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """``value`` must be one of ``choices``, words and perhaps None."""
    if not isinstance(value, (str, NoneType)) or value not in choices:
        listed = ", ".join(map(str, choices))
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}")


def check_sizes(**sizes: Any) -> list[int]:
    """Every size must be an integer of at least 1; as ints."""
    checked = [check_integer(name, size) for name, size in sizes.items()]
    for name, size in zip(sizes, checked, strict=True):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    return checked


def check_integer(name: str, value: Any) -> int:
    """``value`` must be an integer, of NumPy's or a tensor of one element perhaps; as an int."""
    if isinstance(value, _INTEGERS) and not isinstance(value, bool):
        return cast(int, value)
    if not isinstance(value, bool) and hasattr(value, "__index__"):
        with contextlib.suppress(TypeError, RuntimeError):  # the latter of tensors without values
            if not isinstance(value, Tensor) or value.dtype != torch.bool:
                return operator.index(value)
    raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")


def check_number(name: str, value: Any, or_else: str = "") -> float:
    """``value`` must be a real number, of NumPy's or a 0-dim tensor perhaps; as a float."""
    if isinstance(value, _SYMBOLIC):
        return cast(float, value)
    number = value
    if type(value) is not float:
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name}: expected a number, got a tensor that requires grad")
        if not _is_number(value):
            raise TypeError(f"{name}: expected a number{or_else}, got {type(value).__name__}")
        try:
            number = float(value)
        except OverflowError:
            number = math.nan
    if number != number:
        raise ValueError(f"{name}: expected a number{or_else}, got {value!r}")
    return cast(float, number)


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        real = value.dtype != torch.bool and not value.is_complex()
        return real and value.dim() == 0 and not value.is_meta
    return isinstance(value, Real) and not isinstance(value, bool)


def check_probability(name: str, value: Any) -> float:
    """``value`` must be a probability; as a float."""
    p = value if type(value) is float else check_number(name, value)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {p}")
    return p


def check_eps(name: str, value: Any) -> float:
    """``value`` must be a finite number, not negative; as a float."""
    eps = value if type(value) is float else check_number(name, value)
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {eps}")
    return eps


def check_flag(name: str, value: object) -> None:
    """``value`` must be True or False."""
    if value is not True and value is not False:
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def check_factory(device: Any, dtype: Any) -> None:
    """``device`` and ``dtype`` must be what parameters can have."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in FLOATS):
        raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
    if device is not None:
        try:
            torch.device(device)
        except (RuntimeError, TypeError):
            raise ValueError(
                f"device: expected a device such as 'cuda:0', got {device!r}"
            ) from None


def check_list(name: str, value: Any, items: str) -> list[Any]:
    """``value`` must have items, each checked elsewhere; as a list."""
    try:
        return list(value)
    except TypeError:
        raise TypeError(f"{name}: expected {items}, got {type(value).__name__}") from None


def check_bias(name: str, bias: Any) -> tuple[tuple[float, ...], ...]:
    """``bias`` must be 2 x 2 numbers, none of them infinity or nan; -inf is one. As floats."""
    rows = bias if isinstance(bias, Sequence) else ()
    if len(rows) != 2 or any(not isinstance(r, Sequence) or len(r) != 2 for r in rows):
        raise ValueError(f"{name}: expected 2 x 2 numbers, got {bias!r}")
    numbers = tuple(tuple(check_number(name, b) for b in row) for row in rows)
    if not all(b < math.inf for row in numbers for b in row):
        raise ValueError(f"{name}: expected finite numbers or -inf, got {bias!r}")
    return numbers


def check_residual(residual: Tensor | None, x: Tensor, width: int | None = None) -> None:
    """``residual`` must be None, or shaped like ``x``, perhaps of another ``width``."""
    if residual is None or isinstance(x, Proxy):
        return
    if width is not None and width != x.shape[-1]:
        check_tensor("residual", residual, "[..., D_out]", (*x.shape[:-1], width), x.device)
    elif residual is not x:
        check_tensor("residual", residual, "the shape of x", tuple(x.shape), x.device)


def check_tokens(x: Tensor) -> None:
    """x must be a floating-point tensor with a dimension of tokens."""
    check_floats("x", x, "[..., T, D]")
    if x.dim() < 2:
        raise ValueError(f"x: expected a tensor [..., T, D], got {list(x.shape)}")


def check_splits(name: str, splits: Any, tokens: int, parts: int) -> list[int]:
    """``splits`` must be where each part but the first begins, in order; as ints."""
    listed = check_list(name, splits, f"{parts - 1} integers")
    if len(listed) != parts - 1:
        raise ValueError(f"{name}: expected {parts - 1} integers, got {len(listed)}")
    begins = [check_integer(name, split) for split in listed]
    for before, begin in zip([0, *begins], [*begins, tokens], strict=True):
        if before > begin:
            raise ValueError(f"{name}: expected 0 <= ... <= T = {tokens}, in order, got {begins}")
    return begins


def check_split(split: Any, tokens: int) -> int:
    """``split`` must be -1, or a number of leading tokens; as an int."""
    leading = check_integer("split", split)
    if not -1 <= leading <= tokens:
        raise ValueError(f"split: expected -1 <= split <= T = {tokens}, got {leading}")
    return leading

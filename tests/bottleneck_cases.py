"""Samples of the bottleneck op, and the comparison of a backend with the reference on one."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from compare import check_all, last_bit
from torch import Tensor

import fastadapters
from fastadapters import functional
from fastadapters.ops.bottleneck import PARAMETERS
from fastadapters.ops.codes import ACTIVATION_CODES, DTYPE_CODES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One sample: x [*rows, d], every option of `functional.bottleneck`, and the memory layout."""

    rows: tuple[int, ...] = (3, 35)
    d: int = 96
    r: int = 16
    d_out: int | None = None  # that of x
    dtype: torch.dtype = torch.float32  # of the products
    param_dtype: torch.dtype | None = None
    x_dtype: torch.dtype | None = None  # wider: the sample runs under autocast to dtype
    residual_dtype: torch.dtype | None = None  # of residual "other"
    activation: str = "relu"
    down_bias: bool = True
    up_bias: bool = True
    scale: str = "number"  # number, learnable [1], channel [D_out]
    residual: str = "x"  # x, other, none
    norm: str = "none"  # none, weight, both
    dropout: float = 0.0
    input_dropout: float = 0.0
    layout: str = "contiguous"  # contiguous, slice (of rows), transposed, strided (last dimension)
    cotangent: str = "dense"  # dense, expanded (strides 0)

    @property
    def out_dtype(self) -> torch.dtype:
        if self.residual == "none":
            return self.dtype
        residual = self.residual_dtype if self.residual == "other" else self.x_dtype
        return torch.promote_types(self.dtype, residual or self.dtype)

    @property
    def mixed(self) -> bool:
        return self.x_dtype is not None or self.residual_dtype is not None

    def __str__(self) -> str:
        changed = [
            str(getattr(self, name)).removeprefix("torch.")
            for name, field in self.__dataclass_fields__.items()
            if getattr(self, name) != field.default
        ]
        return "-".join(changed) or "default"


_LORA: dict[str, Any] = {
    "activation": "identity", "down_bias": False, "up_bias": False, "residual": "other",
}  # fmt: skip
LORA = Case(**_LORA)


def option_cases(**common: object) -> list[Case]:
    """Each value of each option at least once, several together."""
    base = Case(**common)  # type: ignore[arg-type]
    changes: list[dict[str, object]] = [
        {},
        {"activation": "gelu", "down_bias": False},
        {"activation": "gelu_tanh", "up_bias": False, "residual": "other"},
        {"activation": "silu", "scale": "learnable", "residual": "none"},
        {"activation": "quick_gelu", "scale": "channel", "norm": "both"},
        {"activation": "identity", "down_bias": False, "up_bias": False, "residual": "other"},
        {"norm": "weight", "scale": "learnable"},
        {"norm": "both", "residual": "none", "dropout": 0.25},
        {"dropout": 0.5, "activation": "gelu", "scale": "channel", "up_bias": False},
        {"dropout": 1.0, "residual": "none"},
        {"layout": "slice", "residual": "other", "norm": "both"},
        {"layout": "transposed", "cotangent": "expanded"},
        {"layout": "strided", "residual": "other"},
    ]
    return [replace(base, **change) for change in changes]


def mixed_cases(dtype: torch.dtype, **common: object) -> list[Case]:
    """Each combination of fp32 and ``dtype`` for x and y, with what reads them otherwise."""
    base = Case(dtype=dtype, param_dtype=torch.float32, **common)  # type: ignore[arg-type]
    wide = torch.float32
    changes: list[dict[str, object]] = [
        {"x_dtype": wide},
        {"x_dtype": wide, "norm": "both", "dropout": 0.25, "activation": "gelu"},
        {"x_dtype": wide, "residual": "other", "residual_dtype": wide, "layout": "slice"},
        {"x_dtype": wide, "residual": "none", "norm": "weight", "layout": "transposed"},
        {"x_dtype": wide, "residual": "none", "scale": "number", "cotangent": "expanded"},
        {"x_dtype": wide, "residual": "other", "activation": "silu"},
        {"residual": "other", "residual_dtype": wide, "norm": "both", "dropout": 0.5},
        {"residual": "other", "residual_dtype": wide, "scale": "channel", "up_bias": False},
    ]
    return [replace(base, **change) for change in changes]


def shape_cases(**common: object) -> list[Case]:
    """Ragged, tiny and empty sizes."""
    sizes = [
        ((0,), 64, 8),
        ((1,), 1, 1),
        ((1,), 100, 33),
        ((2, 0, 3), 32, 4),
        ((5,), 7, 3),
        ((63,), 768, 10),
        ((65,), 100, 48),
        ((2, 3, 33), 130, 64),
        ((130,), 33, 96),
        ((70,), 256, 256),
    ]
    return [
        Case(rows=rows, d=d, r=r, norm=norm, **common)  # type: ignore[arg-type]
        for (rows, d, r), norm in itertools.product(sizes, ("none", "both"))
    ]


def _laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "slice" and t.dim() >= 2:
        wide = t.new_full((*t.shape[:-2], t.shape[-2] + 3, t.shape[-1]), torch.nan)
        wide[..., 2:-1, :] = t
        return wide[..., 2:-1, :]
    if layout == "transposed" and t.dim() >= 3:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided":
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan)
        wide[..., ::2] = t
        return wide[..., ::2]
    return t


def rectangular_cases(**common: object) -> list[Case]:
    """D_out below and above D_in, dropout in front, and both as LoRA has them, which is first."""
    base = Case(**common)  # type: ignore[arg-type]
    wide, thin = 2 * base.d + 5, base.d // 3 + 1
    changes: list[dict[str, object]] = [
        {**_LORA, "d_out": wide, "input_dropout": 0.05},
        {"d_out": thin, "residual": "none", "activation": "silu", "scale": "channel"},
        {
            "d_out": wide, "norm": "both", "residual": "other", "activation": "gelu",
            "scale": "learnable", "input_dropout": 0.3, "dropout": 0.25, "layout": "slice",
        },
        {"input_dropout": 0.5, "norm": "weight", "layout": "transposed"},
        {"d_out": thin, "input_dropout": 1.0, "residual": "none", "cotangent": "expanded"},
    ]  # fmt: skip
    return [replace(base, **change) for change in changes]


def inputs(case: Case, seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a sample: ``x``, ``cotangent`` and whatever the options ask for."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=gen) * scale + shift

    d, r, d_out = case.d, case.r, case.d_out or case.d
    tensors = {
        "x": randn(*case.rows, d, shift=0.5 if case.norm != "none" else 0.0),
        "down_weight": randn(r, d, scale=d**-0.5),
        "up_weight": randn(d_out, r, scale=r**-0.5),
    }
    if case.down_bias:
        tensors["down_bias"] = randn(r, scale=0.5)
    if case.up_bias:
        tensors["up_bias"] = randn(d_out, scale=0.5)
    if case.norm != "none":
        tensors["norm_weight"] = randn(d, scale=0.2, shift=1.0)
    if case.norm == "both":
        tensors["norm_bias"] = randn(d, scale=0.3)
    if case.scale != "number":
        tensors["scale"] = randn(1 if case.scale == "learnable" else d_out, shift=0.7)
    if case.residual == "other":
        tensors["residual"] = randn(*case.rows, d_out)
    tensors["cotangent"] = randn(*case.rows, d_out)
    if case.cotangent == "expanded":
        tensors["cotangent"] = torch.ones((), device=device).expand(*case.rows, d_out)
    dtypes = {"x": case.x_dtype, "residual": case.residual_dtype, "cotangent": case.out_dtype}
    for name, t in tensors.items():
        tensors[name] = t.to(device, dtypes.get(name, case.param_dtype) or case.dtype)
        if name in ("x", "residual"):
            tensors[name] = _laid_out(tensors[name], case.layout)
    return tensors


def run(
    case: Case,
    tensors: dict[str, Tensor],
    backend: str,
    needs: Callable[[str], bool] = lambda name: True,
    seed: int = 7,
) -> dict[str, Tensor]:
    """``y`` and ``d_<name>`` for every input that ``needs`` a gradient, on ``backend``."""
    leaves = {
        name: t.detach().requires_grad_(needs(name))
        for name, t in tensors.items()
        if name != "cotangent"
    }
    arguments = dict(leaves)
    if case.residual == "x":
        arguments["residual"] = arguments["x"]
    if case.scale == "number":
        arguments["scale"] = 0.6  # type: ignore[assignment]
    torch.manual_seed(seed)
    device = tensors["x"].device.type
    autocast = torch.autocast(device, case.dtype, enabled=case.mixed)
    with fastadapters.backend(backend), autocast:
        y = functional.bottleneck(
            **arguments,  # type: ignore[arg-type]
            activation=case.activation,
            dropout=case.dropout,
            input_dropout=case.input_dropout,
            training=True,
        )
        wanted = [name for name in leaves if needs(name)]
        gradients = (
            torch.autograd.grad(y, [leaves[name] for name in wanted], tensors["cotangent"])
            if wanted
            else ()
        )
    named = zip((f"d_{name}" for name in wanted), gradients, strict=True)
    return {"y": y.detach(), **dict(named)}


def op_arguments(
    case: Case, tensors: dict[str, Tensor], requires_grad: bool, *index: Tensor
) -> tuple[Any, ...]:
    """The positional arguments of an operator's forward up to ``add_x``, for a sample."""
    leaves = {
        name: t.detach().requires_grad_(requires_grad and name != "cotangent")
        for name, t in tensors.items()
    }
    return (
        leaves["x"] if case.layout != "strided" else leaves["x"].contiguous(),
        None if "residual" not in leaves else leaves["residual"].contiguous(),
        *(leaves.get(name) for name in PARAMETERS),
        torch.tensor([1, 2]) if case.dropout + case.input_dropout > 0 else None,
        *index,
        0.6 if case.scale == "number" else 1.0,
        1e-5,
        case.dropout,
        case.input_dropout,
        ACTIVATION_CODES[case.activation],
        DTYPE_CODES[case.dtype],
        DTYPE_CODES[case.out_dtype],
        case.residual == "x",
    )


@contextlib.contextmanager
def saving() -> Iterator[set[int]]:
    """The addresses of what autograd saves in this block."""
    saved: set[int] = set()

    def pack(t: Tensor) -> Tensor:
        saved.add(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield saved


def reference_pair(
    case: Case,
    tensors: dict[str, Tensor],
    again: Callable[[int], dict[str, Tensor]] | None = None,
    **kwargs: Any,
) -> Callable[[int], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """(gold, base) of a draw: the reference in float64 and in the compute dtype, as `compare`'s.

    ``again(draw)``: other samples like ``tensors``; by default these, moved in the last bit.
    Gradients are linear in the cotangent: the draws scale it, and the errors back, since half of
    the last bit is worth twice as much just above a power of two as just below it.
    """

    def pair(draw: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if draw == 0 or again is None:
            drawn = {name: last_bit(t, draw, case.dtype) for name, t in tensors.items()}
        else:
            drawn = again(draw)
        factor = 1.0 + draw % 8 / 8
        if draw:
            drawn["cotangent"] = drawn["cotangent"] * factor
        kept = case.mixed  # nothing is rounded before it is read
        rounded = {name: (t if kept else t.to(case.dtype)).double() for name, t in drawn.items()}
        results = [run(case, ts, "reference", **kwargs) for ts in (rounded, drawn)]
        if draw:
            results = [
                {k: t if k == "y" else t.double() / factor for k, t in r.items()} for r in results
            ]
        return results[0], results[1]

    return pair


def check_backend(
    case: Case, backend: str, seed: int = 0, device: str = "cpu"
) -> dict[str, Tensor]:
    """Outputs and all gradients of ``backend``, under the tolerance rule; inputs untouched."""
    tensors = inputs(case, seed, device)
    before = {name: t.clone() for name, t in tensors.items()}
    out = run(case, tensors, backend)
    pair = reference_pair(case, tensors, again=lambda draw: inputs(case, seed + draw, device))
    check_all(out, pair, str(case))
    for name, t in tensors.items():
        assert torch.equal(t, before[name]), f"{case}: {name} was written to"
    return out

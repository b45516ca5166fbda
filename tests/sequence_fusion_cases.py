"""Samples of the sequence fusion op, and the comparison of a backend with the reference on one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from compare import check_all
from torch import Tensor

import fastadapters
from fastadapters import functional

GROUPS = ("x", "down_weight", "down_bias", "time_factor", "feature_factor")


@dataclass(frozen=True)
class Case:
    """One sample: x_m [items, tokens[m], dims[m]], every option of the op, and the layout of x."""

    tokens: tuple[int, ...] = (11, 40, 7)
    dims: tuple[int, ...] = (32, 32, 32)
    widths: tuple[int, ...] = (8, 8, 8)
    items: int = 3
    out_len: int = 8
    dim: int = 32
    rank: int = 1  # of the time factors
    feature_rank: int | None = None  # where summed: that of the feature factors
    factor_tokens: tuple[int, ...] | None = None  # more than the tokens: of the time factors
    dtype: torch.dtype = torch.float32  # of the products
    x_dtypes: tuple[torch.dtype, ...] | None = None
    param_dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    activation: str = "gelu"
    biases: str = "all"  # all, none, some
    residual: str = "other"  # other, leading, none
    lengths: bool = False
    layout: str = (
        "contiguous"  # contiguous, slice (of tokens), transposed, strided (last dimension)
    )

    def __str__(self) -> str:
        changed = [
            str(getattr(self, name)).replace("torch.", "").replace(" ", "")
            for name, field in self.__dataclass_fields__.items()
            if getattr(self, name) != field.default
        ]
        return "-".join(changed) or "default"

    @property
    def summed(self) -> bool:
        return self.feature_rank is not None

    @property
    def mixed(self) -> bool:
        """Whether the sample runs under autocast to its dtype."""
        return self.x_dtypes is not None


def option_cases(**common: object) -> list[Case]:
    """Each value of each option at least once, several together."""
    base = Case(**common)  # type: ignore[arg-type]
    changes: list[dict[str, Any]] = [
        {},
        {"rank": 3, "biases": "some", "activation": "silu"},
        {"rank": 3, "feature_rank": 2, "residual": "leading", "activation": "gelu_tanh"},
        {"lengths": True, "residual": "leading", "out_len": 20, "layout": "slice"},
        {"lengths": True, "factor_tokens": (20, 50, 7), "rank": 2, "residual": "none"},
        {"dims": (24, 7, 50), "widths": (8, 3, 20), "biases": "none", "activation": "quick_gelu"},
        {"activation": "identity", "layout": "transposed", "residual": "leading"},
        {"activation": "relu", "layout": "strided", "feature_rank": 1},
    ]
    return [replace(base, **change) for change in changes]


def shape_cases(**common: object) -> list[Case]:
    """Any number of modalities, ragged and tiny sizes, nothing at all."""
    changes: list[dict[str, Any]] = [
        {"items": 0},
        {"tokens": (5,), "dims": (7,), "widths": (3,), "out_len": 1, "dim": 9},
        {"tokens": (1,) * 3, "dims": (30, 5, 20), "widths": (4,) * 3, "out_len": 1, "rank": 4},
        {"tokens": (70, 3), "dims": (100, 40), "widths": (80, 7), "out_len": 37, "dim": 50},
        {"tokens": (4,) * 8, "dims": (8,) * 8, "widths": (3,) * 8, "rank": 2, "activation": "silu"},
    ]
    return [Case(**common | change) for change in changes]  # type: ignore[arg-type]


def mixed_cases(dtype: torch.dtype) -> list[Case]:
    """fp32 storage beside 16-bit products, of all and of some of the tensors."""
    base = Case(dtype=dtype, param_dtype=torch.float32, activation="silu")
    wide = torch.float32
    return [
        replace(base, x_dtypes=(wide,) * 3, out_dtype=wide, residual="leading"),
        replace(base, x_dtypes=(wide, dtype, wide), out_dtype=wide, rank=2),
        replace(base, x_dtypes=(wide,) * 3, residual="none", lengths=True, feature_rank=2),
    ]


def _laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "slice":
        wide = t.new_full((t.shape[0], t.shape[1] + 3, t.shape[2]), torch.nan)
        wide[:, 2:-1] = t
        return wide[:, 2:-1]
    if layout == "transposed":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided":
        return t.repeat_interleave(2, -1)[..., ::2]
    return t


def inputs(case: Case, seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a sample; those of modality m are named "x m", "down_weight m" and so on."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=gen) * scale

    modalities = len(case.tokens)
    param_dtype, out_dtype = case.param_dtype or case.dtype, case.out_dtype or case.dtype
    tensors = {}
    for m in range(modalities):
        t, d, r = case.tokens[m], case.dims[m], case.widths[m]
        longest = t if case.factor_tokens is None else case.factor_tokens[m]
        x = randn(case.items, t, d).to(case.dtype if case.x_dtypes is None else case.x_dtypes[m])
        tensors[f"x {m}"] = _laid_out(x, case.layout)
        parameters = {"down_weight": randn(r, d, scale=d**-0.5)}
        if case.biases == "all" or (case.biases == "some" and m % 2):
            parameters["down_bias"] = randn(r, scale=0.5)
        parameters["time_factor"] = randn(case.rank, longest, case.out_len, scale=longest**-0.5)
        ranks = case.rank if case.feature_rank is None else case.feature_rank
        parameters["feature_factor"] = randn(ranks, r, case.dim, scale=r**-0.5)
        tensors |= {f"{name} {m}": p.to(param_dtype) for name, p in parameters.items()}
    if case.residual == "other":
        tensors["residual"] = randn(case.items, case.out_len, case.dim).to(out_dtype)
    if case.lengths:
        draws = [torch.randint(0, t + 1, (case.items,), generator=gen) for t in case.tokens]
        tensors["lengths"] = torch.stack(draws)
    tensors["cotangent"] = randn(case.items, case.out_len, case.dim).to(out_dtype)
    if device != "cpu":
        tensors = {n: torch.empty_like(t, device=device).copy_(t) for n, t in tensors.items()}
    return tensors


def run(
    case: Case,
    tensors: dict[str, Tensor],
    backend: str,
    needs: Callable[[str], bool] = lambda name: True,
) -> dict[str, Tensor]:
    """``y`` and ``d_<name>`` for every input that ``needs`` a gradient, on ``backend``."""
    names = [n for n in tensors if n not in ("cotangent", "lengths") and needs(n)]
    leaves = {n: t.detach().requires_grad_(n in names) for n, t in tensors.items()}
    groups = [[leaves.get(f"{g} {m}") for m in range(len(case.tokens))] for g in GROUPS]
    autocast = torch.autocast(tensors["cotangent"].device.type, case.dtype, enabled=case.mixed)
    with fastadapters.backend(backend), autocast:
        y = functional.sequence_fusion(
            *groups,  # type: ignore[arg-type]
            activation=case.activation,
            residual="leading" if case.residual == "leading" else leaves.get("residual"),
            lengths=leaves.get("lengths"),
            fusion="summed" if case.summed else "cp",
        )
        wanted = [leaves[name] for name in names]
        gradients = torch.autograd.grad(y, wanted, tensors["cotangent"]) if wanted else ()
    return {"y": y.detach(), **{f"d_{n}": g for n, g in zip(names, gradients, strict=True)}}


def reference_pair(
    case: Case, seed: int = 0, device: str = "cpu", **kwargs: Any
) -> Callable[[int], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """(gold, base) of a draw: the reference in float64 and in the compute dtype, as `compare`'s."""

    def pair(draw: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        drawn = inputs(case, seed + draw, device)
        exact = {
            name: t if name == "lengths" else (t if case.mixed else t.to(case.dtype)).double()
            for name, t in drawn.items()
        }
        gold, base = (run(case, ts, "reference", **kwargs) for ts in (exact, drawn))
        return gold, base

    return pair


def check_backend(
    case: Case, backend: str, seed: int = 0, device: str = "cpu", **kwargs: Any
) -> dict[str, Tensor]:
    """Output and gradients of ``backend``, under the tolerance rule; inputs untouched."""
    tensors = inputs(case, seed, device)
    before = {name: t.clone() for name, t in tensors.items()}
    out = run(case, tensors, backend, **kwargs)
    check_all(out, reference_pair(case, seed, device, **kwargs), str(case))
    for name, t in tensors.items():
        assert torch.equal(t, before[name]), f"{case}: {name} was written to"
    return out

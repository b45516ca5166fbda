"""The one tolerance rule of the suite.

gold = the reference in float64 on the same (rounded) inputs, base = the reference in the op's
dtype by eager PyTorch, out = the backend under test. For outputs and every gradient:

    max|out - gold| <= 2 max|base - gold| + 2 eps max|gold|
    rms(out - gold) <= 1.5 rms(base - gold) + eps rms(gold)

Both compare samples of rounding errors. Where few roundings decide (a learnable scale, a single
row, a bottleneck of width 2) one base may be exact by luck: there the caller passes several, of
inputs that differ in the last bit, and the worst counts. A single element has no rms: it is held to
the first line.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DRAWS = 5


def last_bit(t: Tensor, draw: int) -> Tensor:
    """``t`` with each element moved by -1, 0 or 1 eps, relatively; draw 0 is ``t`` itself."""
    if draw == 0:
        return t
    gen = torch.Generator().manual_seed(draw)
    steps = torch.randint(-1, 2, t.shape, generator=gen).double()
    return (t * (1 + torch.finfo(t.dtype).eps * steps)).to(t.dtype)


def check(out: Tensor, gold: Tensor, base: Tensor | Sequence[Tensor], name: str) -> None:
    """Fail unless ``out`` is as right as the rule demands; eps is that of ``out.dtype``."""
    bases = [base] if isinstance(base, Tensor) else base
    assert out.shape == gold.shape == bases[0].shape, f"{name}: {out.shape}, not {gold.shape}"
    assert out.dtype == bases[0].dtype, f"{name}: {out.dtype}, expected {bases[0].dtype}"
    if out.numel() == 0:
        return
    assert torch.isfinite(out).all(), f"{name}: not finite"
    eps = torch.finfo(out.dtype).eps
    gold = gold.detach().double()
    error = out.detach().double() - gold
    base_errors = [b.detach().double() - gold for b in bases]
    for kind, factor, floor, norm in (
        ("max", 2.0, 2.0 * eps, lambda t: t.abs().max().item()),
        ("rms", 1.5, eps, lambda t: t.square().mean().sqrt().item()),
    ):
        if kind == "rms" and out.numel() == 1:
            continue
        base_error = max(norm(e) for e in base_errors)
        limit = factor * base_error + floor * norm(gold)
        assert norm(error) <= limit, (
            f"{name}: {kind} error {norm(error):.3e} > {limit:.3e} "
            f"(base {base_error:.3e}, gold {norm(gold):.3e})"
        )

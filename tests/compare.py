"""The one tolerance rule of the suite.

gold = the reference in float64 on the same (rounded) inputs, base = the reference in the op's
dtype by eager PyTorch, out = the backend under test. For outputs and every gradient:

    max|out - gold| <= 2 max|base - gold| + 2 eps max|gold|
    rms(out - gold) <= 1.5 rms(base - gold) + eps rms(gold)

Both compare samples of rounding errors. Where few roundings decide (a learnable scale, a single
row, a bottleneck of width 2) base may be nearly exact by luck. So what fails is given more bases,
each with a gold of its own, on inputs that differ in the last bit: their roundings fall another
way, and the worst counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

DRAWS = 32
Tensors = Mapping[str, Tensor]


def named(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tensors of a list, by their place in it."""
    return {f"tensor {i}": t for i, t in enumerate(tensors)}


def last_bit(t: Tensor, draw: int) -> Tensor:
    """``t`` with each element moved by -1, 0 or 1 eps, relatively; draw 0 is ``t`` itself."""
    if draw == 0:
        return t
    gen = torch.Generator().manual_seed(draw)
    steps = torch.randint(-1, 2, t.shape, generator=gen).double().to(t.device)
    return (t * (1 + torch.finfo(t.dtype).eps * steps)).to(t.dtype)


def _errors(t: Tensor, gold: Tensor) -> tuple[float, float]:
    """(max, rms) of what ``t`` is away from ``gold``."""
    error = t.detach().double() - gold.detach().double()
    return error.abs().max().item(), error.square().mean().sqrt().item()


def check_all(
    out: Tensors, pair: Callable[[int], tuple[Tensors, Tensors]], name: str = "", draws: int = DRAWS
) -> None:
    """Fail unless every tensor of ``out`` is as right as the rule demands, eps being its dtype's.

    ``pair(draw)`` gives (gold, base) on the inputs moved by ``last_bit(t, draw)``.
    """
    gold, base = pair(0)
    assert out.keys() == gold.keys() == base.keys(), f"{name}: {[*out]}, expected {[*gold]}"
    for key, t in out.items():
        assert t.shape == gold[key].shape, f"{name} {key}: {t.shape}, not {gold[key].shape}"
        assert t.dtype == base[key].dtype, f"{name} {key}: {t.dtype}, not {base[key].dtype}"
        assert torch.isfinite(t).all(), f"{name} {key}: not finite"
    errors = {key: _errors(t, gold[key]) for key, t in out.items() if t.numel()}
    sizes = {key: _errors(torch.zeros_like(gold[key]), gold[key]) for key in errors}
    worst = dict.fromkeys(errors, (0.0, 0.0))
    for draw in range(draws):
        if draw:
            gold, base = pair(draw)
        failures = []
        for key in errors:
            worst[key] = tuple(map(max, worst[key], _errors(base[key], gold[key])))
            eps = torch.finfo(out[key].dtype).eps
            for kind, factor, floor, error, base_error, size in zip(
                ("max", "rms"), (2.0, 1.5), (2.0 * eps, eps), errors[key], worst[key], sizes[key],
                strict=True,
            ):  # fmt: skip
                limit = factor * base_error + floor * size
                if error > limit:
                    failures.append(
                        f"{name} {key}: ".lstrip() + f"{kind} error {error:.3e} > {limit:.3e} "
                        f"(base {base_error:.3e}, gold {size:.3e})"
                    )
        if not failures:
            return
    raise AssertionError("; ".join(failures))

"""The one tolerance rule of the suite.

gold = the reference in float64 on the same (rounded) inputs, base = the reference in the op's
dtype by eager PyTorch, out = the backend under test. For outputs and every gradient:

    max|out - gold| <= 2 max|base - gold| + 2 eps max|gold|
    rms(out - gold) <= 1.5 rms(base - gold) + eps rms(gold)

Both compare samples of rounding errors. Where few roundings decide (a learnable scale, a single
row, a bottleneck of width 2) base may be nearly exact by luck, and on which inputs it is depends on
the order in which this CPU's BLAS sums. So what fails is given more bases, each with a gold of its
own, and the worst counts: on inputs drawn again from the same distribution, or, where the inputs
are given, moved in the last bit of the dtype in which the op computes. The smaller a tensor is, the
more of them, until they have as many elements as a large one, which gains next to nothing by it:
its draws are all alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

LEAST_DRAWS, MOST_DRAWS, ELEMENTS = 32, 512, 2**14
Tensors = Mapping[str, Tensor]


def named(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tensors of a list, by their place in it."""
    return {f"tensor {i}": t for i, t in enumerate(tensors)}


def last_bit(t: Tensor, draw: int, dtype: torch.dtype) -> Tensor:
    """``t`` with each element moved by -1, 0 or 1 eps, relatively; draw 0 is ``t`` itself.

    eps is that of ``dtype``, in which the op computes: a smaller step, as a float32 parameter of a
    16-bit op could make, would be lost where the op rounds it, and all draws would be the same.
    """
    if draw == 0:
        return t
    gen = torch.Generator().manual_seed(draw)
    steps = torch.randint(-1, 2, t.shape, generator=gen).double().to(t.device)
    return (t * (1 + torch.finfo(dtype).eps * steps)).to(t.dtype)


def _errors(t: Tensor, gold: Tensor) -> tuple[float, float]:
    """(max, rms) of what ``t`` is away from ``gold``."""
    error = t.detach().double() - gold.detach().double()
    return error.abs().max().item(), error.square().mean().sqrt().item()


def _excess(
    error: tuple[float, float], base: tuple[float, float], size: tuple[float, float], eps: float
) -> str | None:
    """By how much the errors (max, rms) are above the rule, in words, or None."""
    found = []
    for i, (kind, factor, floor) in enumerate((("max", 2.0, 2.0 * eps), ("rms", 1.5, eps))):
        limit = factor * base[i] + floor * size[i]
        if error[i] > limit:
            against = f"base {base[i]:.3e}, gold {size[i]:.3e}"
            found.append(f"{kind} error {error[i]:.3e} > {limit:.3e} ({against})")
    return ", ".join(found) or None


def check_all(out: Tensors, pair: Callable[[int], tuple[Tensors, Tensors]], name: str = "") -> None:
    """Fail unless every tensor of ``out`` is as right as the rule demands, eps being its dtype's.

    ``pair(draw)`` gives (gold, base) for the inputs of ``out``, draw 0, or for others as the rule
    has them: `last_bit`, or a new sample.
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
    undecided = list(errors)
    for draw in itertools.count():
        if draw:
            gold, base = pair(draw)
        for key in tuple(undecided):
            worst[key] = tuple(map(max, worst[key], _errors(base[key], gold[key])))
            eps = torch.finfo(out[key].dtype).eps
            excess = _excess(errors[key], worst[key], sizes[key], eps)
            draws = min(max(ELEMENTS // out[key].numel(), LEAST_DRAWS), MOST_DRAWS)
            assert excess is None or draw + 1 < draws, f"{name} {key}: ".lstrip() + excess
            if excess is None:
                undecided.remove(key)
        if not undecided:
            return

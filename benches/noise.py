"""What samples can tell: an interval for a ratio, and whether more of them are needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Two of the values, between which the median of their law lies with 95 % confidence.

    Each value is below that median with probability 1/2, whatever the law. Fewer than six values
    do not suffice: then it is the smallest and the largest.
    """
    n, ordered = len(values), sorted(values)
    below, k = 0.0, 0
    while (below := below + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    k = max(k - 1, 0)
    return ordered[k], ordered[n - 1 - k]


def ratios(samples: dict[str, list[float]], names: Iterable[str]) -> dict[str, tuple[float, float]]:
    """The `interval` of each candidate's time over that of ours, round by round."""
    ours = samples["ours"]
    return {n: interval([t / o for t, o in zip(samples[n], ours, strict=True)]) for n in names}


def is_settled(low: float, high: float, at: float) -> bool:
    """Whether an interval leaves ``at`` out, or is within 2 % of it: no noise, or no matter."""
    return not low <= at <= high or max(at - low, high - at) < 0.02

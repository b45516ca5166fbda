"""Wander on three sequences of different lengths: what an item lacks is not padded into it.

python -m examples.wander_ragged      draws docs/examples/wander_ragged.png, in 20 seconds

Ours runs as one call; beside it the same module as published, operation for operation, which is the
backend "reference" (there, what lies behind an item's length is masked out).
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadapters
from fastadapters import WanderAdapter

from .side_by_side import Form, Run, place, report, train

LENGTHS = (50, 50, 50)


class Fused(nn.Module):
    """Sequences to one number an item: Wander's adapter and a linear layer."""

    def __init__(self, dim: int, bottleneck: int, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.fuse = WanderAdapter(dim, LENGTHS, bottleneck, feature_rank=4, time_rank=4)
        self.head = nn.Linear(dim, 1)

    def forward(self, sequences: list[Tensor], lengths: list[Tensor]) -> Tensor:
        with fastadapters.backend(self.backend):
            fused = self.fuse(sequences, lengths)
        score: Tensor = self.head(fused.mean(dim=1))
        return score.squeeze(1)


def data(items: int, dim: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Sequences with NaN behind each item's end, their lengths, and a score of all three."""
    generator = torch.Generator().manual_seed(0)
    sequences, lengths, means = [], [], []
    for longest in LENGTHS:
        x = torch.randn(items, longest, dim, generator=generator)
        n = torch.randint(1, longest + 1, (items,), generator=generator)
        x += torch.randn(items, 1, dim, generator=generator)
        x[torch.arange(longest) >= n[:, None]] = torch.nan
        sequences.append(x)
        lengths.append(n)
        means.append(x.nanmean(dim=1)[:, :4].mean(dim=1))
    return sequences, lengths, 2.0 * (means[0] + means[1] * means[2])


def main(
    out: Path, dim: int = 300, bottleneck: int = 16, items: int = 512, batch: int = 64,
    steps: int = 60,
) -> dict[str, Run]:  # fmt: skip
    torch.manual_seed(0)
    sequences, lengths, scores = data(items, dim)
    ours = Fused(dim, bottleneck, "auto")
    published = copy.deepcopy(ours)
    published.backend = "reference"

    def form(model: nn.Module) -> Form:
        def loss(step: int) -> Tensor:
            chosen = torch.arange(step * batch, (step + 1) * batch) % items
            predicted = model([x[chosen] for x in sequences], [n[chosen] for n in lengths])
            return F.mse_loss(predicted, scores[chosen])

        return Form(model.parameters(), loss)

    runs = train({"published": form(published), "fastadapters": form(ours)}, steps, lr=3e-3)
    report(runs, f"Wander, three ragged sequences, D {dim}, r {bottleneck}, batch {batch}", out)
    return runs


if __name__ == "__main__":
    main(place("wander_ragged"))

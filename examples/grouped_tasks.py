"""Sixteen tasks in one batch, an adapter for each: one call, beside a loop over the adapters.

python -m examples.grouped_tasks      draws docs/examples/grouped_tasks.png, in half a minute

A frozen layer gives the tokens; each task wants another change of low rank to them.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapters import GroupedAdapter
from tests.published import AdaptFormer

from .side_by_side import Form, Run, place, report, train


class Loop(nn.Module):
    """What one writes with the published module: the items of each task picked out and put back."""

    def __init__(self, adapters: list[nn.Module]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(adapters)

    def forward(self, x: Tensor, tasks: Tensor) -> Tensor:
        y = torch.empty_like(x)
        for i, adapter in enumerate(self.adapters):
            items = (tasks == i).nonzero().squeeze(1)
            if len(items):
                y = y.index_copy(0, items, adapter(x[items]))
        return y


def main(
    out: Path, tasks: int = 16, dim: int = 384, bottleneck: int = 32, items: int = 64,
    tokens: int = 64, steps: int = 40,
) -> dict[str, Run]:  # fmt: skip
    torch.manual_seed(0)
    ours = GroupedAdapter(dim, bottleneck, [f"task {i}" for i in range(tasks)])
    adapters: list[nn.Module] = []
    for name in ours.names:
        adapter = AdaptFormer(dim, bottleneck, scale=1.0)
        adapter.load_state_dict(ours.adapter(name).state_dict())
        adapters.append(adapter)
    published = Loop(adapters)
    frozen = nn.Linear(dim, dim).requires_grad_(False)
    wanted = torch.randn(tasks, dim, 4) * dim**-0.5, torch.randn(tasks, 4, dim)

    def form(model: nn.Module) -> Form:
        def loss(step: int) -> Tensor:
            generator = torch.Generator().manual_seed(step)
            x = frozen(torch.randn(items, tokens, dim, generator=generator))
            # Each task has items in each batch: AdamW moves adapters whose gradient is zero, too.
            index = torch.randperm(items, generator=generator) % tasks
            target = x + (x @ wanted[0][index]).relu() @ wanted[1][index]
            return F.mse_loss(model(x, index), target)

        return Form(model.parameters(), loss)

    runs = train({"published": form(published), "fastadapters": form(ours)}, steps, lr=3e-3)
    report(runs, f"{tasks} tasks in a batch of {items} items, D {dim}, r {bottleneck}", out)
    return runs


if __name__ == "__main__":
    main(place("grouped_tasks"))

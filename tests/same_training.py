"""That a patched model trains as its client's: gradients, losses, keys, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from compare import check_all, last_bit
from torch import Tensor, nn

import fastadapters
from fastadapters.interop import Report

STEPS = 5
Loss = Callable[[Any], Tensor]


def gradients(model: nn.Module, loss: Loss, dtype: torch.dtype, draw: int = 0) -> dict[str, Tensor]:
    """Of all parameters, as one vector, and the loss; with everything in ``dtype``."""
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.data = last_bit(p.data, draw, p.dtype)
    model.to(dtype)
    value = loss(model)
    value.backward()
    grads = [p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return {"gradient": torch.cat(grads), "loss": value.detach()}


def trained(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def assert_trains_the_same(
    model: nn.Module, loss: Loss, dtype: torch.dtype | None = None
) -> Report:
    """``model`` and its patched copy, whose optimizer is older than the patch.

    ``loss`` calls a model on inputs of the dtype of its parameters. Returns the patch's report, for
    what else there is to say of it; the copy has been put back.
    """
    randomized = model.state_dict()
    for i, (name, t) in enumerate(sorted(randomized.items())):
        if t.is_floating_point() and t.dim() > 1 and not t.any():  # up-projections begin as zeros
            generator = torch.Generator().manual_seed(i)
            randomized[name].copy_(0.05 * torch.randn(t.shape, generator=generator))
    patched = copy.deepcopy(model)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3)
        for m in (model, patched)
    ]
    keys, kinds = [*patched.state_dict()], [type(m) for m in patched.modules()]
    parameters = [*patched.parameters()]
    report = fastadapters.patch(patched)
    assert report.replaced
    assert [*patched.state_dict()] == keys
    assert all(a is b for a, b in zip(patched.parameters(), parameters, strict=True))
    check_all(
        gradients(patched, loss, torch.float32),
        lambda d: (
            gradients(model, loss, torch.float64, d),
            gradients(model, loss, torch.float32, d),
        ),
    )
    decisions = fastadapters.explain(loss, patched)
    assert decisions and all(d.backend != "layers" for d in decisions), decisions
    losses = trained(model, loss, optimizers[0])
    assert losses[-1] != losses[0]
    torch.testing.assert_close(trained(patched, loss, optimizers[1]), losses, rtol=2e-5, atol=1e-6)
    result = copy.copy(report)
    result.replaced = dict(report.replaced)
    report.undo()
    assert [type(m) for m in patched.modules()] == kinds
    torch.testing.assert_close(loss(patched), loss(model), rtol=2e-5, atol=1e-6)
    return result

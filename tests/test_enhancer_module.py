"""`AlignmentEnhancer`: its formula in PyTorch ops, dropped paths."""

from __future__ import annotations

import pytest
import torch
from against_reference import check_against_reference
from module_cases import (
    ACTIVATIONS,
    BACKENDS,
    PLAIN,
    D,
    assert_exact,
    randn,
    sample,
    with_parameters,
)
from torch import Tensor

import fastadapters
from fastadapters import (
    AlignmentEnhancer,
)

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")


def enhanced(module: AlignmentEnhancer, x: Tensor) -> Tensor:
    """The block's branch, written out."""
    hidden = ACTIVATIONS[module.activation](x @ module.fc1.weight.T + module.fc1.bias)
    if module.ffn_layernorm is not None:
        centred = hidden - hidden.mean(-1, keepdim=True)
        hidden = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        hidden = hidden * module.ffn_layernorm.weight + module.ffn_layernorm.bias
    return hidden @ module.fc2.weight.T + module.fc2.bias


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("subln", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_enhancer_is_its_formula(
    activation: str, residual: bool, subln: bool, backend: str
) -> None:
    options = {"activation": activation, "residual": residual, "subln": subln}
    module = sample("enhancer", torch.float64, **options)
    x = randn(3, 5, D, dtype=torch.float64)
    with fastadapters.backend(backend):
        assert_exact(module(x), x * residual + enhanced(module, x))


def test_subln_is_told_by_explain() -> None:
    module = sample("enhancer", subln=True)
    (decision,) = fastadapters.explain(module, randn(3, 5, D))
    assert (decision.backend, decision.op) == ("layers", "bottleneck")
    assert "LayerNorm between the projections" in decision.reason


@pytest.mark.parametrize("subln", [False, True])
def test_dropout_drops_the_output(subln: bool) -> None:
    """As published: an element of what fc2 gives is 0 or scaled; x is not touched."""
    p = 0.25
    module = sample("enhancer", torch.float64, dropout=p, subln=subln)
    x = randn(8, 5, D, dtype=torch.float64)
    branch = module(x) - x
    dropped = branch == 0
    assert 0.15 < dropped.double().mean() < 0.35
    assert_exact(branch[~dropped] + 1, enhanced(module, x)[~dropped] / (1 - p) + 1)
    assert_exact(module.eval()(x), x + enhanced(module, x))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("subln", [False, True])
def test_fp32_parameters_under_bf16(subln: bool, autocast: bool) -> None:
    """bf16 activations give bf16; under autocast the fp32 stream stays."""
    module = sample("enhancer", subln=subln)
    x = randn(3, 5, D, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.float(), module(x.float()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_enhancer_backends(dtype: torch.dtype, backend: str) -> None:
    module = sample("enhancer")
    tensors, as_op = with_parameters(module, x=randn(3, 35, D))
    rounded = {name: t.to(dtype) for name, t in tensors.items()}
    check_against_reference(as_op(module), rounded, "enhancer", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_drop_path_of_one_skips_the_block(backend: str) -> None:
    module, x = sample("enhancer", drop_path=1.0), randn(3, 5, D)
    with fastadapters.backend(backend):
        assert torch.equal(module(x), x)


def test_drop_path_drops_whole_items() -> None:
    """An item is x, or x + branch / (1 - p), and its gradient follows."""
    p = 0.25
    module = sample("enhancer", torch.float64, drop_path=p)
    x = randn(32, 5, D, dtype=torch.float64).requires_grad_()
    dy = randn(32, 5, D, seed=1, dtype=torch.float64)
    kept = x + enhanced(module, x) / (1 - p)
    y = module(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    (kept_dx,) = torch.autograd.grad(kept, x, dy)
    dropped = [torch.equal(y[i], x[i]) for i in range(len(x))]
    assert 0 < sum(dropped) < len(x)
    for i, skipped in enumerate(dropped):
        assert_exact(y[i], x[i] if skipped else kept[i], f"item {i}")
        assert_exact(dx[i], dy[i] if skipped else kept_dx[i], f"gradient of item {i}")


def test_drop_path_only_in_training() -> None:
    x = randn(8, 5, D)
    plain, module = sample("enhancer"), sample("enhancer", drop_path=0.5)
    assert torch.equal(module.eval()(x), plain(x))
    assert not torch.equal(module.train()(x), plain(x))

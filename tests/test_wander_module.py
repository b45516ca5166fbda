"""`WanderAdapter`: its formula in PyTorch ops, its inits."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from module_cases import (
    ACTIVATIONS,
    BACKENDS,
    PLAIN,
    D,
    assert_exact,
    inputs,
    randn,
    randomize,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fastadapters
from fastadapters import (
    WanderAdapter,
)

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")


LENGTHS = (5, 8, 11, 4, 17, 6, 9)


def wander(modalities: int, **options: Any) -> tuple[WanderAdapter, list[Tensor]]:
    """A module of that many modalities in its initial state, and inputs of unit variance."""
    lengths = LENGTHS[:modalities]
    ranks = {"feature_rank": 3, "time_rank": 3, "out_len": 4}
    module = WanderAdapter(D, lengths, 6, **{**ranks, **options}, dtype=torch.float64)
    tensors = [randn(4, t, D, seed=i, dtype=torch.float64) for i, t in enumerate(lengths)]
    return module, tensors


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("fusion", ["summed", "cp"])
def test_wander_is_its_formula(fusion: str, backend: str) -> None:
    module, tensors = wander(3, fusion=fusion)
    randomize(module)
    with fastadapters.backend(backend):
        y = module(tensors)
    terms = []
    for x, down, a, u in zip(
        tensors, module.down, module.factor_t_list, module.factor_dim_list, strict=True
    ):
        if fusion == "summed":
            a, u = a.sum(0, keepdim=True), u.sum(0, keepdim=True)
        h = ACTIVATIONS["gelu"](x @ down.weight.T + down.bias)
        terms.append(a.transpose(1, 2)[:, None] @ h @ u[:, None])  # [R, B, T_o, D]
    assert_exact(y, tensors[0][:, :4] + math.prod(terms).sum(0))


@pytest.mark.parametrize("how", ["pruned", "parametrized"])
def test_factors_that_are_made_of_others(how: str) -> None:
    """`ParameterList` gives them by name, where its own parameters have others."""
    module, tensors = wander(3)
    randomize(module)
    expected = copy.deepcopy(module)
    for factors in (module.factor_t_list, module.factor_dim_list):
        if how == "pruned":
            prune.l1_unstructured(factors, "0", amount=0.5)
        else:
            parametrize.register_parametrization(factors, "0", nn.Softplus())
    with torch.no_grad():
        for name in ("factor_t_list", "factor_dim_list"):
            getattr(expected, name)[0].copy_(getattr(module, name)[0])
    assert_exact(module(tensors), expected(tensors))


@pytest.mark.parametrize("fusion", ["summed", "cp"])
@pytest.mark.parametrize("modalities", range(1, 8))
def test_default_init_has_live_gradients(modalities: int, fusion: str) -> None:
    """No parameter's gradient is 0, and no modality's is drowned by another's."""
    module, tensors = wander(modalities, fusion=fusion)
    y = module(tensors)
    (y * randn(*y.shape, seed=50)).sum().backward()
    norms = {name: p.grad.norm().item() for name, p in module.named_parameters()}
    assert min(norms.values()) > 0
    for factors in ("factor_t_list", "factor_dim_list"):
        group = [norm for name, norm in norms.items() if name.startswith(factors)]
        assert len(group) == modalities
        assert max(group) <= 1000 * min(group)


@pytest.mark.parametrize("fusion", ["summed", "cp"])
@pytest.mark.parametrize("modalities", [2, 3, 7])
def test_published_init_is_dead(modalities: int, fusion: str) -> None:
    """As documented: with two zero factors in each product nothing ever trains."""
    module, tensors = wander(modalities, fusion=fusion, init="published")
    y = module(tensors)
    assert torch.equal(y, tensors[0][:, :4])
    (y * randn(*y.shape, seed=50)).sum().backward()
    assert not any(p.grad.any() for p in module.parameters())


def test_published_init_of_one_modality_is_alive() -> None:
    module, tensors = wander(1, init="published")
    module(tensors).square().sum().backward()
    assert module.factor_t_list[0].grad.any()


@pytest.mark.parametrize("fusion", ["summed", "cp"])
@pytest.mark.parametrize(
    "optimizer", [partial(torch.optim.SGD, lr=0.1), partial(torch.optim.Adam, lr=0.01)]
)
def test_default_init_trains(optimizer: Callable[..., Any], fusion: str) -> None:
    module, tensors = wander(3, fusion=fusion)
    target = randn(4, 4, D, seed=50, dtype=torch.float64)
    steps = optimizer(module.parameters())
    losses = []
    for _ in range(5):
        loss = F.mse_loss(module(tensors), target)
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_wander_leaves_its_inputs_alone() -> None:
    module, tensors = wander(3, out_len=7)
    tensors = [t.requires_grad_() for t in tensors]
    given, values = list(tensors), [t.detach().clone() for t in tensors]
    module(tensors).sum().backward()
    assert len(tensors) == 3
    for t, same, value in zip(tensors, given, values, strict=True):
        assert t is same
        assert torch.equal(t, value)


@pytest.mark.parametrize("out_len", [5, 6, 13, 14, 24])
def test_leading_tokens_come_from_the_next_sequence(out_len: int) -> None:
    """With the published init the fused branch is 0, and what remains is the leading tokens."""
    module, tensors = wander(3, out_len=out_len, init="published")
    assert torch.equal(module(tensors), torch.cat(tensors, dim=1)[:, :out_len])


@pytest.mark.parametrize("backend", PLAIN)
def test_fusions_agree_at_rank_one(backend: str) -> None:
    results = []
    for fusion in ("summed", "cp"):
        module, tensors = wander(3, fusion=fusion, feature_rank=1, time_rank=1)
        randomize(module)
        with fastadapters.backend(backend):
            results.append(module(tensors))
    assert_exact(*results)


BAD_WANDER = [
    (lambda xs: xs[:1], "inputs: expected M = 2 tensors [B, T_m, D], got 1"),
    (lambda xs: [*xs, xs[0]], "inputs: expected M = 2 tensors [B, T_m, D], got 3"),
    (lambda xs: xs[::-1], "inputs[0]: expected [B, T, D] = [3, 5, 24], got [3, 7, 24]"),
    (lambda xs: [None, None], "inputs: expected at least one tensor, got None for all"),
    (lambda xs: [xs[0][..., 1:], xs[1]], "inputs[0]: expected [B, T, D] = [3, 5, 24]"),
    (lambda xs: [xs[0][0], xs[1]], "inputs[0]: expected [B, T, D], only B may be 0, got [5, 24]"),
    (lambda xs: [xs[0], xs[1][1:]], "inputs[1]: expected [B, T, D] = [3, 7, 24], got [2, 7, 24]"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fusion", ["summed", "cp"])
def test_missing_modality(fusion: str, backend: str) -> None:
    """Its factor is left out of the product, and its parameters get no gradient."""
    module, tensors = wander(3, fusion=fusion)
    tensors = [t.float() for t in tensors]
    randomize(module.float())
    for missing in range(3):
        rest = [i for i in range(3) if i != missing]
        alone = WanderAdapter(
            D, [LENGTHS[i] for i in rest], 6, feature_rank=3, time_rank=3, out_len=4, fusion=fusion
        )
        for name in ("down", "factor_dim_list", "factor_t_list"):
            for i, j in enumerate(rest):
                getattr(alone, name)[i] = getattr(module, name)[j]
        module.zero_grad()
        with fastadapters.backend(backend):
            y = module([None if i == missing else t for i, t in enumerate(tensors)])
            assert torch.equal(y, alone([tensors[i] for i in rest]))
        y.sum().backward()
        for i in range(3):
            for p in (module.factor_t_list[i], module.factor_dim_list[i], module.down[i].weight):
                assert (p.grad is None) == (i == missing)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_and_short_tensors(backend: str) -> None:
    """Tokens beyond an item's length are as if they were not there; T may be below seq_lens."""
    module, tensors = wander(3, out_len=7)
    tensors = [t.float() for t in tensors]
    randomize(module.float())
    lengths = torch.tensor([[5, 5, 5, 5], [8, 6, 6, 3], [2, 11, 9, 1]])
    with fastadapters.backend(backend):
        y = module(tensors, lengths)
        for item in range(4):
            n = lengths[:, item].tolist()
            cut = [t[item : item + 1, :k] for t, k in zip(tensors, n, strict=True)]
            torch.testing.assert_close(y[item], module(cut)[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(y, module(tensors, [None, *lengths[1:]]))
        # Fewer tokens than T_o: zeros where there are no more.
        few = module([t[:, :2] for t in tensors])
    branch = few - torch.cat([*(t[:, :2] for t in tensors), torch.zeros(4, 1, D)], dim=1)
    assert torch.allclose(branch[:, -1], few[:, -1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [False, True])
def test_width_per_modality(lengths: bool, backend: str) -> None:
    """As CMU-MOSI's raw features are: the output has the first width, and its leading tokens."""
    dims = (30, 5, 20)
    module = WanderAdapter(dims, (6, 7, 8), 4, feature_rank=2, time_rank=2, out_len=3)
    randomize(module)
    xs = [randn(2, t, d, seed=i) for i, (t, d) in enumerate(zip((6, 7, 8), dims, strict=True))]
    counts = torch.tensor([[6, 2], [7, 4], [1, 8]]) if lengths else None
    with fastadapters.backend(backend):
        y = module(xs, counts)
    product: Any = 1.0
    for i, x in enumerate(xs):
        h = F.gelu(module.down[i](x))
        if counts is not None:
            h = torch.where((torch.arange(x.shape[1]) < counts[i][:, None])[..., None], h, 0.0)
        a, u = module.factor_t_list[i].sum(0), module.factor_dim_list[i].sum(0)
        product = product * (a.T @ h @ u)
    leading = xs[0][:, :3].clone()
    if lengths:
        leading[1, 2] = 0
    assert torch.allclose(y, leading + product, atol=1e-5)
    assert y.shape == (2, 3, 30)
    assert "dim=(30, 5, 20)" in repr(module)
    with pytest.raises(ValueError, match=re.escape("dim: expected one number or M = 3, got 2")):
        WanderAdapter((30, 5), (6, 7, 8), 4, feature_rank=2, time_rank=2)
    with pytest.raises(ValueError, match="out_len: expected at most 6"):
        WanderAdapter(dims, (6, 7, 8), 4, feature_rank=2, time_rank=2, out_len=7)


def test_runs_fused() -> None:
    """`auto` takes the kernel where there is one, the leading tokens and the sums included."""
    module, tensors = wander(2)
    (decision,) = fastadapters.explain(module.float(), [t.float() for t in tensors])
    assert decision.backend == BACKENDS[-1]


def test_bad_lengths() -> None:
    module, tensors = wander(3)
    with pytest.raises(ValueError, match="lengths: expected M = 3, got 2"):
        module(tensors, torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="integers"):
        module(tensors, torch.ones(3, 4))


@pytest.mark.parametrize("fusion", ["summed", "cp"])
def test_own_layers_with_lengths_and_a_missing_modality(fusion: str) -> None:
    """A hook on a down-projection: it is called, and the result is the same."""
    module, tensors = wander(3, fusion=fusion)
    randomize(module)
    lengths = torch.tensor([[5, 2, 3, 1], [8, 0, 6, 3], [2, 11, 9, 1]])
    given = [tensors[0], None, tensors[2]]
    expected = module(given, lengths), module(tensors, lengths)
    module.down[0].register_forward_hook(lambda *args: None)
    for xs, y in zip((given, tensors), expected, strict=True):
        assert_exact(module(xs, lengths), y)


@pytest.mark.parametrize(("bad", "message"), BAD_WANDER)
def test_bad_wander_input(bad: Callable[[list[Tensor]], list[Tensor]], message: str) -> None:
    module = WanderAdapter(D, (5, 7), 6, feature_rank=2, time_rank=3, out_len=4)
    with pytest.raises(ValueError, match=re.escape(message)):
        module(bad(inputs("wander")))

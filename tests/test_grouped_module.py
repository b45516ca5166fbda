"""`GroupedAdapter`: each item as its own `BottleneckAdapter`; adding, removing, loading by name."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization

import fastadapters
from fastadapters import BottleneckAdapter, GroupedAdapter

D, R = 24, 6
NAMES = ("cats", "dogs", "birds")
OPTIONS = [
    {},
    {"layernorm": "in", "scale": "channel", "activation": "gelu"},
    {"scale": "learnable", "bias": False, "residual": False},
    {"scale": 0.3, "init": "houlsby"},
]


def module(**options: object) -> GroupedAdapter:
    torch.manual_seed(0)
    grouped = GroupedAdapter(D, R, NAMES, **options)
    with torch.no_grad():
        for p in grouped.parameters():
            p += 0.2 * torch.randn_like(p)
    return grouped


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_item_through_its_adapter(options: dict[str, object]) -> None:
    grouped = module(**options)
    x, other = torch.randn(4, 5, D), torch.randn(4, 5, D)
    names = ["birds", "cats", "birds", "cats"]
    index = grouped.index(names)
    assert index.tolist() == [2, 0, 2, 0]
    for arguments in ((), (other,), (None, True), (other, False)):
        y = grouped(x, index, *arguments)
        for b, name in enumerate(names):
            own = [a[b] if isinstance(a, Tensor) else a for a in arguments]
            torch.testing.assert_close(y[b], grouped.adapter(name)(x[b], *own))
    grouped(x, index).square().sum().backward()
    assert all(p.grad[1].eq(0).all() for p in grouped.parameters())


def test_added_removed_and_loaded_by_name() -> None:
    grouped = module(scale="learnable")
    before = {name: grouped.adapter(name).state_dict() for name in NAMES}
    published = BottleneckAdapter(D, R, scale="learnable")
    grouped.up_weight.requires_grad_(False)
    grouped.add("fish", published)
    grouped.remove("dogs")
    assert grouped.names == ("cats", "birds", "fish")
    assert grouped.down_weight.shape == (3, R, D)
    assert not grouped.up_weight.requires_grad and grouped.down_weight.requires_grad
    expected = {**before, "fish": published.state_dict()}
    for name in grouped.names:
        torch.testing.assert_close(dict(grouped.adapter(name).state_dict()), dict(expected[name]))
    parameter = grouped.down_weight
    grouped.load("birds", before["dogs"])
    assert grouped.down_weight is parameter
    state = grouped.adapter("birds").state_dict()
    torch.testing.assert_close(dict(state), dict(before["dogs"]))
    grouped.add("new")
    assert grouped.up_weight[3].eq(0).all() and grouped.scale[3] == 1


def test_the_state_dict_knows_the_names() -> None:
    grouped = module(layernorm="in")
    file = io.BytesIO()
    with torch.device("meta"):  # where the parameters are counts, not the default
        torch.save(grouped.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(isinstance(t, Tensor) for t in state.values())
    other = GroupedAdapter(D, R, NAMES, layernorm="in")
    other.load_state_dict(state)
    x, index = torch.randn(2, 3, D), torch.tensor([1, 2])
    assert torch.equal(other(x, index), grouped(x, index))
    crossed = GroupedAdapter(D, R, ("dogs", "cats", "birds"), layernorm="in")
    with pytest.raises(ValueError, match="expected the adapters dogs, cats, birds, got cats"):
        crossed.load_state_dict(state)
    for twin in (copy.deepcopy(grouped), pickle.loads(pickle.dumps(grouped))):
        assert twin.names == NAMES and torch.equal(twin(x, index), grouped(x, index))


def test_errors() -> None:
    grouped = module()
    with pytest.raises(ValueError, match="name: expected another than cats, dogs, birds"):
        grouped.add("dogs")
    with pytest.raises(TypeError, match="name: expected a string, got int"):
        grouped.add(3)  # type: ignore[arg-type]
    for call in (grouped.remove, grouped.adapter, lambda n: grouped.index([n])):
        with pytest.raises(ValueError, match="name: expected one of cats, dogs, birds, got 'cow'"):
            call("cow")
    with pytest.raises(ValueError, match=r"adapter: expected down_proj.weight \[6, 24\], got"):
        grouped.load("cats", BottleneckAdapter(D, 7))
    with pytest.raises(ValueError, match=r"adapter: expected down_proj.bias, .* got down_proj.we"):
        grouped.add("fish", BottleneckAdapter(D, R, bias=False))
    with pytest.raises(ValueError, match="layernorm: expected one of None, in, got 'out'"):
        GroupedAdapter(D, R, layernorm="out")
    with pytest.raises(ValueError, match=r"down_weight: expected \[N, r, D_in\], none of them 0"):
        GroupedAdapter(D, R)(torch.randn(2, D), torch.tensor([0, 0]))


def test_stacks_that_are_no_parameters_any_more() -> None:
    """Pruned or parametrized they run; what would change them refuses before it changes any."""
    x, index = torch.randn(2, D), torch.tensor([2, 0])
    for change in (
        lambda m: prune.l1_unstructured(m, "up_weight", 0.5),
        lambda m: register_parametrization(m, "up_weight", nn.Tanh()),
    ):
        grouped = module()
        change(grouped)
        before = grouped(x, index)
        for call in (grouped.add, grouped.remove, grouped.adapter):
            with pytest.raises(TypeError, match="up_weight: expected a parameter, got a Tensor"):
                call("fish" if call == grouped.add else "dogs")
        assert grouped.names == NAMES and torch.equal(grouped(x, index), before)


def test_trains_from_the_meta_device_and_under_compile() -> None:
    torch._dynamo.reset()
    with torch.device("meta"):
        grouped = GroupedAdapter(D, R, NAMES, dropout=0.5)
    grouped = grouped.to_empty(device="cpu")
    grouped.reset_parameters()
    assert grouped.down_weight.ne(0).all() and grouped.up_weight.eq(0).all()
    grouped.eval()
    compiled = torch.compile(grouped, backend="aot_eager", fullgraph=True)
    x, index = torch.randn(4, 3, D), torch.tensor([0, 2, 2, 1])
    torch.testing.assert_close(compiled(x, index), grouped(x, index))
    optimizer = torch.optim.SGD(grouped.parameters(), 0.1)
    losses = []
    for _ in range(5):
        loss = (grouped(x, index) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_traced_by_fx_and_explained() -> None:
    grouped = module()
    x, index = torch.randn(4, 3, D), torch.tensor([0, 2, 2, 1])

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped = grouped

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return self.grouped(x, index)

    traced = torch.fx.symbolic_trace(Model())
    torch.testing.assert_close(traced(x, index), grouped(x, index))
    assert [d.op for d in fastadapters.explain(grouped, x, index)] == ["bottleneck"]


def test_adapters_are_as_the_module_is_now() -> None:
    """Not as it was built: dropout is scheduled, and dtype and device may have changed."""
    grouped = GroupedAdapter(D, R, NAMES, layernorm="in", scale=0.5, device="meta")
    grouped = grouped.to_empty(device="cpu").to(torch.bfloat16)
    grouped.reset_parameters()
    grouped.add("fish")
    grouped.dropout, grouped.activation, grouped.residual = 0.4, "gelu", False
    grouped.norm_eps, grouped.number = 1e-3, 2.0
    grouped.add("bees")
    x = torch.randn(1, 3, D)
    grouped.to(torch.float32)
    with torch.no_grad():
        grouped.up_weight += 0.1
    own = grouped.adapter("bees")
    assert own.dropout == 0.4
    torch.testing.assert_close(own.eval()(x), grouped.eval()(x, grouped.index(["bees"])))
    grouped.add("own", own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, "adapter: expected activation 'relu', got 'gelu'"),
        ({"scale": 0.1}, "adapter: expected scale 1.0, got 0.1"),
        ({"residual": False}, "adapter: expected residual True, got False"),
    ],
)
def test_an_adapter_that_computes_something_else(options: dict[str, object], message: str) -> None:
    """Its values alone would silently give other results than its own."""
    grouped, other = module(), BottleneckAdapter(D, R, **options)
    for call in (grouped.add, grouped.load):
        with pytest.raises(ValueError, match=message):
            call("fish" if call == grouped.add else "dogs", other)
    assert grouped.names == NAMES
    grouped.add("fish", other.state_dict())


def test_a_state_dict_that_was_cast_or_averaged() -> None:
    """With all that is in it, the names included."""
    states = [module(scale="learnable").state_dict() for _ in range(2)]
    soup = {key: 0.1 * states[0][key] + 0.9 * states[1][key] for key in states[0]}
    for state in (soup, {key: t.half() for key, t in states[0].items()}):
        grouped = GroupedAdapter(D, R, NAMES, scale="learnable")
        grouped.load_state_dict(state)
        torch.testing.assert_close(grouped.scale, state["scale"].float())

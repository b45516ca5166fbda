"""The layers of a module are modules: what is put on or in the place of one acts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from module_cases import (
    D,
    adaptformer,
    assert_exact,
    call,
    every_module,
    inputs,
    randn,
    randomize,
    sample,
)
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import fastadapters
from fastadapters import AlignmentEnhancer, BottleneckAdapter, MultiwayAdapter

pytestmark = [
    pytest.mark.usefixtures("seeded_on_one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
]


class LoRA(nn.Module):
    """A layer with a trainable update of rank 2 beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(randn(2, base.in_features, seed=60))
        self.b = nn.Parameter(randn(base.out_features, 2, seed=61))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + x @ self.a.T @ self.b.T
        return y


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Int8(Tensor):
    """A weight in 8 bits: a subclass, as quantizers put in a Linear's place of a weight."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Int8:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values_, self.scale_ = values, scale

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten.detach.default:
            return cls(args[0].values_, args[0].scale_)
        plain = [a.values_ * a.scale_ if isinstance(a, cls) else a for a in args]
        return op(*plain, **(kwargs or {}))


def quantize(layer: nn.Linear) -> None:
    weight = layer.weight.detach()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    quantized = Int8((weight / scale).round().to(torch.int8), scale)
    layer.weight = nn.Parameter(quantized, requires_grad=False)


def replace(name: str, make: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Module], None]:
    return lambda module: module.register_module(name, make(module.get_submodule(name)))


def hooked(name: str, register: str, hook: Callable[..., Any]) -> Callable[[nn.Module], None]:
    return lambda module: getattr(module.get_submodule(name), register)(hook)


def on(name: str, change: Callable[..., Any], *args: Any) -> Callable[[nn.Module], None]:
    """Let ``change`` loose on the layer."""

    def alter(module: nn.Module) -> None:
        torch.manual_seed(5)
        change(module.get_submodule(name), *args)

    return alter


def halve_forward(layer: nn.Module) -> None:
    """As accelerate's and others' hooks do: another forward on the instance."""
    forward = layer.forward
    layer.forward = lambda x: forward(x) / 2  # type: ignore[method-assign]


def as_halved(layer: nn.Module) -> None:
    """As FSDP2 does: another class for the instance."""
    layer.__class__ = Halved


def without_parameter(layer: nn.Module) -> None:
    weight = layer.weight.detach() / 2
    del layer.weight
    layer.weight = weight


ALTERATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "LoRA down": replace("down_proj", LoRA),
    "LoRA up": replace("up_proj", LoRA),
    "weight_norm": on("down_proj", weight_norm),
    "weight_norm parametrization": on("up_proj", parametrizations.weight_norm),
    "spectral_norm": on("up_proj", spectral_norm),
    "spectral_norm parametrization": on("down_proj", parametrizations.spectral_norm),
    "pruning": on("down_proj", prune.l1_unstructured, "weight", 0.5),
    "pruned bias": on("up_proj", prune.random_unstructured, "bias", 0.5),
    "8 bits": on("up_proj", quantize),
    "subclass": on("down_proj", as_halved),
    "instance's forward": on("down_proj", halve_forward),
    "a weight that is no parameter": on("up_proj", without_parameter),
    "activation": lambda module: module.register_module("non_linear_func", nn.Tanh()),
    "trained activation": lambda module: module.register_module("non_linear_func", nn.PReLU()),
    "norm without weight": replace(
        "adapter_layer_norm_before", lambda norm: nn.LayerNorm(D, elementwise_affine=False)
    ),
    "norm's forward": on("adapter_layer_norm_before", halve_forward),
    "norm's hook": hooked(
        "adapter_layer_norm_before", "register_forward_hook", lambda m, args, y: 2 * y
    ),
    "forward hook": hooked("up_proj", "register_forward_hook", lambda m, args, y: 2 * y),
    "pre-hook": hooked("down_proj", "register_forward_pre_hook", lambda m, args: args[0] / 2),
    "hook with keywords": lambda module: module.up_proj.register_forward_hook(
        lambda m, args, kwargs, y: 2 * y, with_kwargs=True
    ),
    "backward hook": hooked(
        "up_proj", "register_full_backward_hook", lambda m, dx, dy: (3 * dx[0],)
    ),
    "backward pre-hook": hooked(
        "down_proj", "register_full_backward_pre_hook", lambda m, dy: (3 * dy[0],)
    ),
}


def results(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of x and of what is trained."""
    x = x.detach().requires_grad_()
    y = module(x)
    leaves = {"x": x, **{n: p for n, p in module.named_parameters() if p.requires_grad}}
    dy = randn(*y.shape, seed=9).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def ours_and_published(layernorm: str = "in") -> tuple[nn.Module, nn.Module]:
    ours = BottleneckAdapter(D, 7, layernorm=layernorm, scale="learnable")
    published = adaptformer.Adapter(D, 7, "learnable", layernorm=layernorm)
    randomize(ours)
    published.load_state_dict(ours.state_dict())
    return ours, published


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layernorm", ["in", "out"])
@pytest.mark.parametrize("name", ALTERATIONS)
def test_what_is_done_to_a_layer_acts(name: str, layernorm: str, autocast: bool) -> None:
    """As in the published module: the same output and gradients, to the last bit."""
    ours, published = ours_and_published(layernorm)
    x = randn(3, 5, D)
    before = results(ours, x)
    for module in (ours, published):
        ALTERATIONS[name](module)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, expected = results(ours, x), results(published, x)
        (decision,) = fastadapters.explain(ours, x)
    assert decision.backend == "layers"
    assert decision.reason.endswith("its own forward is called")
    assert got.keys() == expected.keys()
    for key, t in expected.items():
        assert torch.equal(got[key], t), key
        assert got[key].dtype == t.dtype
    assert any(not torch.equal(before[key], got[key]) for key in before.keys() & got.keys())


@pytest.mark.parametrize("name", ["LoRA up", "forward hook", "8 bits", "norm's hook"])
@pytest.mark.parametrize("layernorm", ["in", "out"])
def test_fp32_layers_under_bf16_activations(layernorm: str, name: str) -> None:
    """Rounded on the way in, as the op does; gradients in the parameters' dtype."""
    ours, _ = ours_and_published(layernorm)
    ALTERATIONS[name](ours)
    x = randn(3, 5, D, dtype=torch.bfloat16)
    got = results(ours, x)
    assert got.pop("y").dtype == got.pop("x").dtype == torch.bfloat16
    assert {t.dtype for t in got.values()} == {torch.float32}
    torch.testing.assert_close(ours(x), ours(x.float()).bfloat16(), rtol=0.05, atol=0.05)


def test_a_lazy_layer_takes_any_width_once() -> None:
    ours, _ = ours_and_published()
    ours.register_module("down_proj", nn.LazyLinear(7))
    x = randn(3, 5, D)
    assert fastadapters.explain(ours, x)[0].backend == "layers"
    assert type(ours.down_proj) is nn.Linear
    assert fastadapters.explain(ours, x)[0].backend != "layers"
    with pytest.raises(ValueError, match=r"down_weight: expected \[r, D_in\] = \[7, 25\]"):
        ours(randn(3, 5, D + 1))


@every_module
def test_weights_that_another_network_computes(kind: str) -> None:
    """As hypernetworks do, and FSDP's flat parameters: a tensor in the place of each parameter."""
    plain, tensors = sample(kind), inputs(kind)
    call(plain, tensors)[0].sum().backward()
    for name, p in plain.named_parameters():
        module, (path, _, own) = sample(kind), name.rpartition(".")
        layer = module.get_submodule(path)
        if isinstance(layer, nn.ParameterList):
            continue
        leaf = p.detach().clone().requires_grad_()
        delattr(layer, own)
        setattr(layer, own, leaf * 1.0)
        outs = call(module, tensors)
        for a, b in zip(outs, call(plain, tensors), strict=True):
            torch.testing.assert_close(a, b, msg=name)
        if p.grad is not None:
            outs[0].sum().backward()
            torch.testing.assert_close(leaf.grad, p.grad, rtol=1e-4, atol=1e-4, msg=name)


@contextmanager
def global_hooks() -> Iterator[list[nn.Module]]:
    called: list[nn.Module] = []
    handles = [
        register_module_forward_hook(lambda m, args, y: called.append(m)),
        register_module_forward_pre_hook(lambda m, args: called.append(m)),
        register_module_full_backward_hook(lambda m, dx, dy: called.append(m)),
    ]
    yield called
    for handle in handles:
        handle.remove()


def test_global_hooks() -> None:
    ours, _ = ours_and_published()
    with global_hooks() as called:
        results(ours, randn(3, 5, D))
        assert fastadapters.explain(ours, randn(3, 5, D))[0].backend == "layers"
    for layer in (ours, ours.down_proj, ours.up_proj, ours.adapter_layer_norm_before):
        assert called.count(layer) >= 3
    assert fastadapters.explain(ours, randn(3, 5, D))[0].backend != "layers"


@every_module
def test_hooks_on_every_layer(kind: str) -> None:
    """A layer whose output a hook doubles does what one with doubled parameters does."""
    tensors = inputs(kind, torch.float64)
    layers = [
        name
        for name, layer in sample(kind).named_modules()
        if isinstance(layer, (nn.Linear, nn.LayerNorm)) and "mha" not in name
    ]
    for name in layers:
        hooked, doubled = sample(kind, torch.float64), sample(kind, torch.float64)
        hooked.get_submodule(name).register_forward_hook(lambda m, args, y: 2 * y)
        for p in doubled.get_submodule(name).parameters():
            p.data *= 2
        decisions = fastadapters.explain(call, hooked, tensors)
        assert "layers" in {d.backend for d in decisions}
        for got, expected in zip(call(hooked, tensors), call(doubled, tensors), strict=True):
            assert_exact(got, expected, name)


@every_module
def test_plain_layers_are_not_called(kind: str) -> None:
    module = sample(kind)
    decisions = fastadapters.explain(call, module, inputs(kind))
    assert "layers" not in {d.backend for d in decisions}


@every_module
def test_a_fused_backend_chosen_by_name_refuses(kind: str) -> None:
    module = sample(kind)
    layer, *_ = [m for m in module.modules() if isinstance(m, nn.Linear)]
    layer.register_forward_hook(lambda m, args, y: y)
    message = "backend 'triton' cannot run .* has hooks: its own forward is called"
    with fastadapters.backend("triton"), pytest.raises(RuntimeError, match=message):
        call(module, inputs(kind))
    with fastadapters.backend("eager"):
        call(module, inputs(kind))


@pytest.mark.parametrize("split", [-1, 0, 2, 5])
def test_multiway_calls_its_adapters(split: int) -> None:
    """LoRA, a hook or another class on one of the adapters, or in it."""
    x = randn(3, 5, D)
    module = MultiwayAdapter(D, 7)
    randomize(module)
    expected = module(x, split)
    ours = copy.deepcopy(module)
    ours.adaptmlp_text.register_forward_hook(lambda m, args, y: 2 * y)
    want = expected.clone()
    first = 5 if split == -1 else split
    want[:, first:] *= 2
    torch.testing.assert_close(ours(x, split), want)
    ours = copy.deepcopy(module)
    ours.adaptmlp_vision.down_proj = LoRA(ours.adaptmlp_vision.down_proj)
    got = ours(x, split)
    torch.testing.assert_close(got[:, first:], expected[:, first:])
    if first:
        torch.testing.assert_close(got[:, :first], ours.adaptmlp_vision(x[:, :first]))
        assert not torch.allclose(got[:, :first], expected[:, :first])


def test_multiway_adapters_of_different_options() -> None:
    x = randn(3, 5, D)
    module = MultiwayAdapter(D, 7)
    module.adaptmlp_text = BottleneckAdapter(D, 9, activation="gelu", layernorm="out")
    randomize(module)
    expected = [module.adaptmlp_vision(x[:, :2]), module.adaptmlp_text(x[:, 2:])]
    torch.testing.assert_close(module(x, 2), torch.cat(expected, dim=1))


@every_module
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_altered_modules(kind: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    module, tensors = sample(kind), inputs(kind)
    for layer in [m for m in module.modules() if type(m) is nn.Linear]:
        parametrizations.weight_norm(layer) if copied is copy.deepcopy else weight_norm(layer)
    with torch.no_grad():
        for a, b in zip(call(copied(module), tensors), call(module, tensors), strict=True):
            torch.testing.assert_close(a, b)


def test_peft_trains_and_merges() -> None:
    """LoRA of peft on the projections: gradients, then the same output with the update merged."""
    peft = pytest.importorskip("peft")
    module = nn.Sequential(BottleneckAdapter(D, 7, layernorm="in"), AlignmentEnhancer(D, 40))
    randomize(module)
    x = randn(3, 5, D)
    before = module(x)
    config = peft.LoraConfig(
        target_modules=["down_proj", "up_proj", "fc1", "fc2"], r=2, lora_alpha=4
    )
    tuned = peft.get_peft_model(module, config)
    torch.testing.assert_close(tuned(x), before)
    trained = [p for n, p in tuned.named_parameters() if "lora" in n]
    assert len(trained) == 8 and all(p.requires_grad for p in trained)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(4):
        loss = F.mse_loss(tuned(x), 0 * x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.any() for p in trained)
    expected = tuned(x)
    merged = tuned.merge_and_unload()
    assert type(merged[0].down_proj) is nn.Linear
    torch.testing.assert_close(merged(x), expected)
    assert "layers" not in {d.backend for d in fastadapters.explain(merged, x)}


@every_module
def test_offloaded_weights(kind: str) -> None:
    """accelerate keeps weights elsewhere and fetches them around the forward that they are for.

    `MultiheadAttention` and `ParameterList` never call what holds theirs: these go as a whole.
    """
    accelerate = pytest.importorskip("accelerate")
    module, tensors = sample(kind), inputs(kind)
    expected = call(module, tensors)
    accelerate.cpu_offload(
        module,
        execution_device=torch.device("cpu"),
        preload_module_classes=["MultiheadAttention", "WanderAdapter"],
    )
    assert {p.device.type for p in module.parameters()} == {"meta"}
    with torch.no_grad():
        for a, b in zip(call(module, tensors), expected, strict=True):
            torch.testing.assert_close(a, b)


@every_module
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_quantize_dynamic(kind: str) -> None:
    module, tensors = sample(kind).eval(), inputs(kind)
    quantized = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        for a, b in zip(call(quantized, tensors), call(module, tensors), strict=True):
            assert not torch.equal(a, b)
            torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)

"""`patch` itself: what it replaces, skips and warns of, and what a patched model survives."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import published
import pytest
import torch
import torch.distributed as dist
from module_cases import randn, randomize
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations

import fastadapters
from fastadapters.interop import patching

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")
D = 24


def layers(**options: Any) -> Any:
    return randomize(nn.Sequential(*(published.Layer(D, 7, **options) for _ in range(2))))


def adapter(**options: Any) -> Any:
    return randomize(published.AdaptFormer(D, 7, **options))


def unknown(base: type[nn.Module], source: str, path: Path) -> Any:
    """A class whose forward is ``source``, in a file, where its tree can be read."""
    path = path / "copied.py"
    path.write_text(source)
    names: dict[str, Any] = {"nn": nn}
    exec(compile(source, str(path), "exec"), names)
    return type("Adapter", (base,), {"forward": names["forward"]})


SOURCE = textwrap.dedent(inspect.getsource(published.AdaptFormer.forward))
# What public copies of the class changed, and that `patch` must not take for the original.
CHANGES = {
    "dropout in eval, too": ("training=self.training", "training=True"),
    "its own residual": ("residual = x if", "residual = 2 * x if"),
    "another order of arguments": ("add_residual=True, residual=None", "residual=None, add=True"),
    "an activation behind": ("up = up * self", "up = self.non_linear_func(up) * self"),
    "another option's name": ('option == "out"', 'option == "behind"'),
    "no scale": ("up * self.scale", "up * 1.0"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_not_known(change: str, tmp_path: Path) -> None:
    before, after = CHANGES[change]
    source = SOURCE.replace(before, after)
    assert source != SOURCE
    if change == "another order of arguments":
        source = source.replace("if add_residual", "if add")
    model = nn.ModuleDict({"a": unknown(published.AdaptFormer, source, tmp_path)(D, 7)})
    with pytest.warns(UserWarning, match="replaced nothing; skipped: {'a': 'forward not known'}"):
        report = fastadapters.patch(model)
    assert report.skipped == {"a": "forward not known"} and not report.replaced


def test_exact_copies_are_known(tmp_path: Path) -> None:
    """Under another name, with docstring, annotations, comments and another default."""
    source = SOURCE.replace(
        "add_residual=True, residual=None):",
        'add_residual: bool = False, residual: "Tensor | None" = None):\n    """Docs."""  # why',
    )
    module = randomize(unknown(published.AdaptFormer, source, tmp_path)(D, 7))
    x, expected = randn(3, D), module(randn(3, D))
    assert fastadapters.patch(module).replaced == {"": "adaptformer"}
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module(x, True), expected + x)


def test_a_source_that_is_not_what_runs(tmp_path: Path) -> None:
    """The file was changed after the import, or ``nn`` is another module than PyTorch's."""
    kind = unknown(published.AdaptFormer, SOURCE.replace("up * self.scale", "up * 2.0"), tmp_path)
    (tmp_path / "copied.py").write_text(SOURCE)
    with pytest.warns(UserWarning, match="forward not known"):
        fastadapters.patch(kind(D, 7))
    kind = unknown(published.AdaptFormer, SOURCE, tmp_path)
    kind.forward.__globals__["nn"] = torch
    with pytest.warns(UserWarning, match="forward not known"):
        fastadapters.patch(kind(D, 7))


def test_wrapped_forwards_are_not_known(tmp_path: Path) -> None:
    model = adapter()

    class Wrapped(published.AdaptFormer):
        forward = torch.no_grad()(published.AdaptFormer.forward)

    model.__class__ = Wrapped
    with pytest.warns(UserWarning, match="forward not known"):
        fastadapters.patch(model)


def tanh(a: Any) -> None:
    a.non_linear_func = nn.Tanh()


def leaky(a: Any) -> None:
    a.non_linear_func = nn.LeakyReLU()


def hooked_activation(a: Any) -> None:
    a.non_linear_func.register_forward_hook(lambda *args: None)


def hooked(a: Any) -> None:
    a.down_proj.register_forward_hook(lambda *args: None)


def parametrized(a: Any) -> None:
    parametrizations.weight_norm(a.up_proj)


def own_forward(a: Any) -> None:
    a.forward = lambda x: x


def narrower(a: Any) -> None:
    a.up_proj = nn.Linear(7, 5)


def certain_dropout(a: Any) -> None:
    a.dropout = 1.0


class Registered(published.AdaptFormer):
    def __init_subclass__(cls) -> None:
        raise ValueError(f"there is a {cls.__name__} already")


def registered(a: Any) -> None:
    a.__class__ = Registered


SKIPPED: dict[Callable[[Any], None], str] = {
    tanh: "non_linear_func is a torch.nn.modules.activation.Tanh: no op has this activation",
    leaky: "non_linear_func is a torch.nn.modules.activation.LeakyReLU: no op has this activation",
    hooked_activation: "non_linear_func has hooks: its own forward is called",
    hooked: "down_proj has hooks: its own forward is called",
    parametrized: "up_proj is a .*ParametrizedLinear: its own forward is called",
    own_forward: "forward is set on the module itself, not by its class",
    narrower: "it maps 24 to 5 channels: expected as many out as in",
    certain_dropout: "dropout is 1.0",
    registered: "no class can be derived from its class: there is a Registered already",
}


@pytest.mark.parametrize("change", SKIPPED, ids=lambda f: f.__name__)
def test_skipped(change: Callable[[Any], None]) -> None:
    model = layers()
    change(model[1].adaptmlp)
    report = fastadapters.patch(model)
    assert [*report.replaced] == ["0.adaptmlp"] and [*report.skipped] == ["1.adaptmlp"]
    assert re.fullmatch(SKIPPED[change], report.skipped["1.adaptmlp"])
    assert type(model[1].adaptmlp) in (published.AdaptFormer, Registered)


def test_what_is_no_adapter_is_not_reported() -> None:
    """A gated MLP has projections of these names, too."""

    class GatedMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(D, 40), nn.Linear(D, 40)
            self.down_proj = nn.Linear(40, D)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down_proj(self.gate_proj(x).relu() * self.up_proj(x))
            return y

    with pytest.warns(UserWarning, match="replaced nothing: there is no adapter we know"):
        report = fastadapters.patch(nn.Sequential(GatedMLP(), nn.Linear(D, D)))
    assert not report.skipped
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        fastadapters.patch([adapter()])  # type: ignore[arg-type]


def test_as_context_manager_twice() -> None:
    model = layers()
    x, expected = randn(3, D), model(randn(3, D))
    kinds = [type(m) for m in model.modules()]
    with fastadapters.patch(model) as outer:
        patched = [type(m) for m in model.modules()]
        with fastadapters.patch(model) as inner, warnings.catch_warnings():
            warnings.simplefilter("error")
            assert inner.replaced == outer.replaced == fastadapters.patch(model).replaced
            assert [type(m) for m in model.modules()] == patched
        assert [type(m) for m in model.modules()] == patched != kinds
        assert all(isinstance(m, k) for m, k in zip(model.modules(), kinds, strict=True))
        assert repr(outer).splitlines()[:2] == [
            "2 replaced, 0 skipped",
            "  0.adaptmlp: adaptformer",
        ]
        torch.testing.assert_close(model(x), expected)
    assert [type(m) for m in model.modules()] == kinds
    assert not outer.replaced
    assert torch.equal(model(x), expected)
    outer.undo()


def test_copies_and_pickles_are_patched(tmp_path: Path) -> None:
    model = layers(layernorm="in", scale="learnable_scalar")
    fastadapters.patch(model)
    x = randn(3, D)
    expected = model(x)
    torch.save(model, tmp_path / "model.pt")
    others = [copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)]
    others += [pickle.loads(pickle.dumps(model, protocol)) for protocol in range(6)]
    for other in others:
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(other(x), expected)
        assert other[0].adaptmlp.down_proj.weight is not model[0].adaptmlp.down_proj.weight
    assert copy.copy(model[0].adaptmlp).down_proj is model[0].adaptmlp.down_proj


class Reducing(published.AdaptFormer):
    """A class that says itself how it is pickled."""

    forward = FunctionType(published.AdaptFormer.forward.__code__, {"nn": nn}, argdefs=(True, None))

    def __reduce__(self) -> Any:
        return type(self), (D, 7), self.__dict__


def test_pickling_of_a_class_with_its_own_reduce() -> None:
    model = randomize(Reducing(D, 7))
    fastadapters.patch(model)
    other = pickle.loads(pickle.dumps(model))
    assert type(other) is type(model)
    assert torch.equal(other(randn(3, D)), model(randn(3, D)))


def test_a_pickle_in_a_process_with_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapter()
    fastadapters.patch(model)
    pickled = pickle.dumps(model)
    monkeypatch.setattr(patching, "known_client", lambda kind: None)
    assert type(pickle.loads(pickled)) is published.AdaptFormer


@pytest.mark.parametrize("layernorm", ["none", "in", "out"])
def test_compile(layernorm: str) -> None:
    torch.compiler.reset()
    model = layers(layernorm=layernorm)
    x, expected = randn(3, 5, D), model(randn(3, 5, D))
    fastadapters.patch(model)
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected
    )
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_fsdp2(one_process: None) -> None:
    model = layers()
    x, expected = randn(3, D), copy.deepcopy(model)(randn(3, D))
    report = fastadapters.patch(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model:
        fully_shard(layer.adaptmlp, mesh=mesh)
    fully_shard(model, mesh=mesh)
    decisions = fastadapters.explain(lambda: torch.testing.assert_close(model(x), expected))
    assert len(decisions) == 2 and all(d.backend != "layers" for d in decisions), decisions
    model(x).sum().backward()
    assert fastadapters.patch(model).replaced == report.replaced
    with pytest.raises(
        RuntimeError, match=r"undo: the class of '0\.adaptmlp' was set by something"
    ):
        report.undo()
    assert len(report.replaced) == 2
    sharded = layers()
    fully_shard(sharded[0].adaptmlp, mesh=mesh)
    skipped = fastadapters.patch(sharded).skipped
    assert skipped == {"0.adaptmlp": "FSDP2 has set its class: patch before fully_shard"}


def test_undo_of_a_module_whose_forward_was_set() -> None:
    model = adapter()
    report = fastadapters.patch(model)
    model.forward = model.forward
    with pytest.raises(RuntimeError, match="undo: the forward of '' was set by something else"):
        report.undo()
    del model.forward
    report.undo()


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.b = base, nn.Parameter(randn(base.out_features, seed=60))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + x.sum(-1, keepdim=True) * self.b
        return y


def with_lora(a: Any) -> None:
    a.up_proj = LoRA(a.up_proj)


@pytest.mark.parametrize("change", [with_lora, hooked, hooked_activation, tanh])
def test_layers_changed_after_the_patch_are_called(change: Callable[[Any], None]) -> None:
    own, model = adapter(), adapter()
    fastadapters.patch(model)
    change(own)
    change(model)
    x, residual = randn(3, D), randn(3, D, seed=1)
    (decision,) = fastadapters.explain(model, x)
    assert decision.backend == "layers"
    for args in ((), (False,), (True, residual)):
        assert torch.equal(model(x, *args), own(x, *args))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_parameters", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(of_parameters: torch.dtype, dtype: torch.dtype, autocast: bool) -> None:
    """The dtype of the result, or the error, is the client's."""
    own = adapter(scale="learnable_scalar").to(of_parameters)
    model = copy.deepcopy(own)
    fastadapters.patch(model)
    x, residual = randn(3, D).to(dtype), randn(3, D, seed=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for args in ((), (False,), (True, residual)):
            try:
                expected = own(x, *args)
            except RuntimeError as error:
                with pytest.raises(type(error), match="dtype"):
                    model(x, *args)
            else:
                torch.testing.assert_close(model(x, *args), expected, rtol=0.02, atol=0.02)


def test_a_residual_that_is_broadcast() -> None:
    own, model = adapter(), adapter()
    fastadapters.patch(model)
    x, residual = randn(3, 5, D), randn(5, D, seed=1)
    assert torch.equal(model(x, residual=residual), own(x, residual=residual))


def test_dropout_is_active_in_training_alone() -> None:
    model = adapter(dropout=0.5)
    expected = model.eval()(randn(300, D))
    fastadapters.patch(model)
    torch.testing.assert_close(model(randn(300, D)), expected)
    model.train()
    x = randn(300, D)
    first, second = model(x) - x, model(x) - x
    assert not torch.equal(first, second)
    several = torch.stack([model(x) for _ in range(300)]).mean(0)
    assert (several - expected).abs().mean() < 0.1 * (expected - x).abs().mean()


def test_no_client_is_imported() -> None:
    program = (
        "import sys, torch, fastadapters, warnings; warnings.simplefilter('ignore');"
        "fastadapters.patch(torch.nn.Linear(2, 2));"
        "print(*{'adapters', 'peft', 'torchscale', 'transformers'} & {*sys.modules})"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not out.stdout.strip()

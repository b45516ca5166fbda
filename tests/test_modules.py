"""The modules: names of parameters, options and inits; each against its formula in PyTorch ops."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from against_reference import check_against_reference, run
from torch import Tensor, nn
from torch.func import functional_call

import fastadapters
from fastadapters import (
    AlignmentEnhancer,
    BottleneckAdapter,
    MultiModalAdapter,
    MultiwayAdapter,
    WanderAdapter,
    backends,
)

BACKENDS = ["eager"] + [name for name in ("cpu",) if backends.unavailable(name) is None]
PLAIN = ["reference", "eager"]
INF = math.inf
D = 24

# Of each module: how to build it, and the shapes of its inputs.
KINDS: dict[str, tuple[Callable[..., nn.Module], list[tuple[int, ...]]]] = {
    "bottleneck": (
        partial(BottleneckAdapter, D, 7, layernorm="in", scale="channel"),
        [(3, 5, D)],
    ),
    "multiway": (
        partial(MultiwayAdapter, D, 7, layernorm="out", scale="learnable"),
        [(3, 5, D)],
    ),
    "enhancer": (partial(AlignmentEnhancer, D, 40), [(3, 5, D)]),
    "multimodal": (
        partial(MultiModalAdapter, D, 16, 4, downsample="mlp", upsample="mlp", hidden_dim=8),
        [(6, D), (3, D)],
    ),
    "wander": (
        partial(WanderAdapter, D, (5, 7), 6, feature_rank=2, time_rank=3),
        [(3, 5, D), (3, 7, D)],
    ),
}
every_module = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def seeded_on_one_thread() -> Iterator[None]:
    """One, because on tensors this small the threads of two test processes wait for each other."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def randomize(module: nn.Module) -> nn.Module:
    """Draw all parameters, so that none is 0 or 1 as an init would have it."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            t = randn(*p.shape, seed=i + 1)
            p.copy_(t * p.shape[-1] ** -0.5 if p.dim() > 1 else 0.5 + 0.5 * t)
    return module


def sample(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    return randomize(KINDS[kind][0](dtype=dtype, **options))


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(*shape, seed=i + 100, dtype=dtype) for i, shape in enumerate(KINDS[kind][1])]


def call(module: nn.Module, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The module's outputs."""
    if isinstance(module, MultiwayAdapter):
        return (module(*tensors, split=2),)
    if isinstance(module, WanderAdapter):
        return (module(tensors),)
    outs = module(*tensors)
    return outs if isinstance(outs, tuple) else (outs,)


def reset(module: nn.Module) -> None:
    """Draw the initial parameters again; a `MultiwayAdapter` has none of its own."""
    for part in module.children() if isinstance(module, MultiwayAdapter) else [module]:
        part.reset_parameters()


def assert_equal(outs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for out, want in zip(outs, expected, strict=True):
        assert torch.equal(out, want)


def assert_exact(out: Tensor, expected: Tensor, name: str = "") -> None:
    """Equal in float64 but for the order of the operations."""
    assert out.dtype == torch.float64
    assert out.shape == expected.shape, f"{name}: {out.shape}, not {expected.shape}"
    error = (out - expected).abs().max().item()
    assert error <= 1e-12 * expected.abs().max().item(), f"{name}: {error:.1e}"


def assert_same_results(
    module: Callable[[dict[str, Tensor]], Tensor],
    expected: Callable[[dict[str, Tensor]], Tensor],
    tensors: dict[str, Tensor],
) -> None:
    """Two ops of the tensors, in float64: outputs and all gradients, next to the largest of them.

    A sum can cancel: a scale in front of a LayerNorm has no gradient but for its eps.
    """
    exact = {name: t.double() for name, t in tensors.items()}
    got, want = run(module, exact, "reference"), run(expected, exact, "reference")
    assert got.keys() == want.keys()
    size = max(t.abs().max().item() for t in want.values())
    for name, t in got.items():
        assert t.shape == want[name].shape, name
        error = (t - want[name]).abs().max().item()
        assert error <= 1e-12 * size, f"{name}: {error:.1e}"


def with_parameters(
    module: nn.Module, **tensors: Tensor
) -> tuple[dict[str, Tensor], Callable[[nn.Module, Any], Callable[[dict[str, Tensor]], Tensor]]]:
    """``tensors`` and the module's parameters by name, and what makes a module an op of these.

    The op calls ``module(x, *arguments, residual)``, the residual if there is one.
    """
    named = {**tensors, **{name: p.detach() for name, p in module.named_parameters()}}

    def as_op(module: nn.Module, *arguments: Any) -> Callable[[dict[str, Tensor]], Tensor]:
        def op(t: dict[str, Tensor]) -> Tensor:
            parameters = {name: value for name, value in t.items() if name not in tensors}
            args = (t["x"], *arguments, *([t["residual"]] if "residual" in t else []))
            y: Tensor = functional_call(module, parameters, args)
            return y

        return op

    return named, as_op


def linear(name: str, n_in: int, n_out: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (n_out, n_in)}
    return {**shapes, f"{name}.bias": (n_out,)} if bias else shapes


def prefixed(prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


PROJECTIONS = {**linear("down_proj", 24, 7), **linear("up_proj", 7, 24)}
NORM = {"adapter_layer_norm_before.weight": (24,), "adapter_layer_norm_before.bias": (24,)}
DOWNSAMPLERS = {
    "linear": linear("downsampler", 24, 16),
    "factored": {**linear("downsampler.0", 24, 8), **linear("downsampler.1", 8, 16)},
    "mlp": {**linear("downsampler.0", 24, 8), **linear("downsampler.2", 8, 16)},
}
UPSAMPLERS = {
    "linear": linear("upsampler", 16, 24),
    "mlp": {**linear("upsampler.0", 16, 8), **linear("upsampler.2", 8, 24)},
}
ATTENTION = {
    "mha.in_proj_weight": (48, 16),
    "mha.in_proj_bias": (48,),
    **linear("mha.out_proj", 16, 16),
}
WANDER = {
    **linear("down.0", 24, 6),
    **linear("down.1", 24, 6),
    "factor_dim_list.0": (2, 6, 24),
    "factor_dim_list.1": (2, 6, 24),
    "factor_t_list.0": (3, 5, 4),
    "factor_t_list.1": (3, 9, 4),
}
STATES: list[tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = [
    (partial(BottleneckAdapter, 24, 7), PROJECTIONS),
    (
        partial(BottleneckAdapter, 24, 7, bias=False),
        {**linear("down_proj", 24, 7, False), **linear("up_proj", 7, 24, False)},
    ),
    (
        partial(BottleneckAdapter, 24, 7, layernorm="in", scale="learnable"),
        {**PROJECTIONS, **NORM, "scale": (1,)},
    ),
    (
        partial(BottleneckAdapter, 24, 7, layernorm="out", scale="channel"),
        {**PROJECTIONS, **NORM, "scale": (24,)},
    ),
    (
        partial(MultiwayAdapter, 24, 7, scale="learnable"),
        {
            **prefixed("adaptmlp_vision", {**PROJECTIONS, "scale": (1,)}),
            **prefixed("adaptmlp_text", {**PROJECTIONS, "scale": (1,)}),
        },
    ),
    (partial(AlignmentEnhancer, 24, 40), {**linear("fc1", 24, 40), **linear("fc2", 40, 24)}),
    *(
        (
            partial(MultiModalAdapter, 24, 16, 4, downsample=down, upsample=up, hidden_dim=8),
            {**DOWNSAMPLERS[down], **ATTENTION, **UPSAMPLERS[up]},
        )
        for down, up in itertools.product(DOWNSAMPLERS, UPSAMPLERS)
    ),
    (partial(WanderAdapter, 24, (5, 9), 6, feature_rank=2, time_rank=3, out_len=4), WANDER),
]


@pytest.mark.parametrize(("build", "shapes"), STATES)
def test_published_names_and_shapes(
    build: Callable[[], nn.Module], shapes: dict[str, tuple[int, ...]]
) -> None:
    module = build()
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == shapes
    assert {name for name, _ in module.named_parameters()} == shapes.keys()


@every_module
def test_load_state_dict(kind: str) -> None:
    module, other, tensors = sample(kind), KINDS[kind][0](), inputs(kind)
    expected = call(module, tensors)
    assert not torch.equal(call(other, tensors)[0], expected[0])
    other.load_state_dict(module.state_dict())
    assert_equal(call(other, tensors), expected)


@every_module
def test_shared_parameters_stay_shared(kind: str) -> None:
    """A module given another's parameters uses these very tensors, before and after a call."""
    module, other, tensors = sample(kind), KINDS[kind][0](), inputs(kind)
    other.load_state_dict(module.state_dict(keep_vars=True), assign=True)
    before = call(other, tensors)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)
    after = call(other, tensors)
    assert_equal(after, call(module, tensors))
    assert not torch.equal(before[0], after[0])
    for name, p in module.named_parameters():
        assert other.get_parameter(name).data_ptr() == p.data_ptr(), name


def saved(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


def pickled(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    pickle.dump(module, buffer)
    buffer.seek(0)
    loaded: nn.Module = pickle.load(buffer)
    return loaded


@every_module
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_copies(kind: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    module, tensors = sample(kind).eval(), inputs(kind)
    other = copied(module)
    assert repr(other) == repr(module)
    assert other.training == module.training
    assert_equal(call(other, tensors), call(module, tensors))
    for name, p in module.named_parameters():
        assert other.get_parameter(name).data_ptr() != p.data_ptr(), name


@pytest.mark.parametrize(
    ("kind", "options", "shown"),
    [
        ("bottleneck", {"scale": 0.5}, "activation='relu', scale=0.5, dropout=0.0, layernorm='in'"),
        ("bottleneck", {"scale": "channel", "residual": False}, "scale=[24]"),
        ("multiway", {"modalities": ("image", "audio")}, "modalities=('image', 'audio')"),
        ("enhancer", {"drop_path": 0.1}, "activation='gelu', dropout=0.0, drop_path=0.1"),
        ("multimodal", {"mask": "additive"}, "num_heads=4, bias=((0.0, 1.0), (1.0, 0.0))"),
        ("wander", {"out_len": 3}, "seq_lens=(5, 7), out_len=3, fusion='summed'"),
    ],
)
def test_repr_shows_the_options(kind: str, options: dict[str, Any], shown: str) -> None:
    assert shown in repr(KINDS[kind][0](**options))


@every_module
def test_meta_device(kind: str) -> None:
    """Built without memory, then given some (poisoned, see conftest), then drawn: all of it."""
    module = KINDS[kind][0](device="meta")
    assert {p.device.type for p in module.parameters()} == {"meta"}
    module = module.to_empty(device="cpu")
    assert all(p.isnan().all() for p in module.parameters())
    reset(module)
    assert all(p.isfinite().all() for p in module.parameters())
    assert all(out.isfinite().all() for out in call(module, inputs(kind)))


@every_module
def test_dtype(kind: str) -> None:
    module = KINDS[kind][0](dtype=torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    outs = call(module, inputs(kind, torch.bfloat16))
    assert {out.dtype for out in outs} == {torch.bfloat16}


@every_module
def test_reset_parameters_draws_again(kind: str) -> None:
    """Other values from another seed, the same from the same; what is not drawn is a constant."""
    module = sample(kind)
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        reset(module)
        states.append({name: t.clone() for name, t in module.state_dict().items()})
    drawn = 0
    for name in states[0]:
        first, again, other = (state[name] for state in states)
        assert torch.equal(first, again), name
        assert torch.equal(first, other) == (first.unique().numel() == 1), name
        drawn += not torch.equal(first, other)
    assert drawn > 0


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in KINDS),
        ("bottleneck", {"layernorm": "out"}),
        ("multiway", {"layernorm": None}),
        ("enhancer", {"drop_path": 0.5}),
        ("wander", {"fusion": "cp", "time_rank": 2}),
    ],
)
def test_fp32_parameters_in_bf16(
    kind: str, options: dict[str, Any], backend: str, autocast: bool
) -> None:
    """Under autocast, or under bf16 activations: bf16 outputs, gradients in each leaf's dtype."""
    module = sample(kind, **options)
    tensors = inputs(kind, torch.float32 if autocast else torch.bfloat16)
    leaves = [*(t.requires_grad_() for t in tensors), *module.parameters()]
    with (
        fastadapters.backend(backend),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        outs = call(module, tensors)
    assert {out.dtype for out in outs} == {torch.bfloat16}
    sum(out.float().square().sum() for out in outs).backward()
    for leaf in leaves:
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bottleneck", "multiway", "enhancer"])
def test_dropout_only_in_training(kind: str, backend: str) -> None:
    (x,) = inputs(kind)
    plain, module = sample(kind), sample(kind, dropout=0.5)
    with fastadapters.backend(backend):
        (expected,) = call(plain, [x])
        assert_equal(call(module.eval(), [x]), [expected])
        module.train()
        outs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outs += call(module, [x])
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], expected)


@every_module
def test_meta_tensors(kind: str) -> None:
    """Shapes without data, as tools that plan memory use them."""
    module = sample(kind, device="meta")
    tensors = [t.to("meta") for t in inputs(kind)]
    expected = call(sample(kind), inputs(kind))
    assert [t.shape for t in call(module, tensors)] == [t.shape for t in expected]


@pytest.mark.parametrize("kind", ["bottleneck", "multiway"])
@pytest.mark.parametrize("layernorm", [None, "out"])
def test_bad_residual(kind: str, layernorm: str | None) -> None:
    module = KINDS[kind][0].func(D, 7, layernorm=layernorm)  # type: ignore[attr-defined]
    split = [2] if kind == "multiway" else []
    for bad in (torch.ones(4, 3, 5, D), torch.ones(D)):
        with pytest.raises(ValueError, match="residual: expected the shape of x"):
            module(torch.ones(3, 5, D), *split, residual=bad)


BAD_OPTIONS = [
    ("bottleneck", {"activation": "tanh"}, ValueError, "activation: expected one of"),
    ("bottleneck", {"layernorm": "before"}, ValueError, "layernorm: expected one of None, in, out"),
    ("bottleneck", {"scale": "both"}, ValueError, "scale: expected one of learnable, channel"),
    ("bottleneck", {"scale": torch.ones(1)}, TypeError, "scale: expected a number, 'learnable'"),
    ("bottleneck", {"init": "zeros"}, ValueError, "init: expected one of lora, houlsby"),
    ("bottleneck", {"dropout": 1.5}, ValueError, "dropout: expected a probability in [0, 1]"),
    ("bottleneck", {"dim": 0}, ValueError, "dim: expected at least 1, got 0"),
    ("bottleneck", {"bottleneck": 2.5}, TypeError, "bottleneck: expected an integer, got float"),
    ("multiway", {"modalities": ("text", "text")}, ValueError, "modalities: expected two differ"),
    ("multiway", {"modalities": ("text",)}, ValueError, "modalities: expected two different names"),
    ("multiway", {"init": "zeros"}, ValueError, "init: expected one of lora, houlsby"),
    ("multiway", {"modalities": ("a.b", "c")}, ValueError, "modalities: expected two different"),
    ("multiway", {"modalities": "ab"}, ValueError, "modalities: expected two different names"),
    ("enhancer", {"activation": "tanh"}, ValueError, "activation: expected one of"),
    ("enhancer", {"dropout": -0.1}, ValueError, "dropout: expected a probability in [0, 1]"),
    ("enhancer", {"drop_path": 1.1}, ValueError, "drop_path: expected a probability in [0, 1]"),
    ("enhancer", {"hidden_dim": 0}, ValueError, "hidden_dim: expected at least 1, got 0"),
    ("multimodal", {"num_heads": 3}, ValueError, "num_heads: expected a divisor of 16, got 3"),
    ("multimodal", {"num_heads": 0}, ValueError, "num_heads: expected at least 1, got 0"),
    ("multimodal", {"mask": "causal"}, ValueError, "mask: expected 'masked', 'additive' or 2 x 2"),
    ("multimodal", {"downsample": "conv"}, ValueError, "downsample: expected one of linear, fac"),
    ("multimodal", {"upsample": "factored"}, ValueError, "upsample: expected one of linear, mlp"),
    ("multimodal", {"mask": ((0,), (0,))}, ValueError, "mask: expected 2 x 2 numbers"),
    ("multimodal", {"dim": 0}, ValueError, "dim: expected at least 1, got 0"),
    ("multimodal", {"blend": "x"}, TypeError, "blend: expected a number, got str"),
    ("wander", {"feature_rank": 0}, ValueError, "feature_rank: expected at least 1, got 0"),
    ("wander", {"fusion": "sum"}, ValueError, "fusion: expected one of summed, cp, got 'sum'"),
    ("wander", {"fusion": "cp"}, ValueError, "time_rank: expected feature_rank = 2 with 'cp'"),
    ("wander", {"init": "lora"}, ValueError, "init: expected one of trainable, published"),
    ("wander", {"out_len": 0}, ValueError, "out_len: expected at least 1, got 0"),
    ("wander", {"out_len": 13}, ValueError, "out_len: expected at most 12 (all tokens), got 13"),
]
POSITIONAL = {"dim": 0, "bottleneck": 1, "hidden_dim": 1, "num_heads": 2}


@pytest.mark.parametrize(("kind", "change", "error", "message"), BAD_OPTIONS)
def test_bad_options(kind: str, change: dict[str, Any], error: type, message: str) -> None:
    build = KINDS[kind][0]
    assert isinstance(build, partial)
    args, options = list(build.args), dict(build.keywords)
    for name, value in change.items():
        if name in POSITIONAL:
            args[POSITIONAL[name]] = value
        else:
            options[name] = value
    with pytest.raises(error, match=re.escape(message)):
        build.func(*args, **options)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("layernorm", [None, "in", "out"])
def test_lora_starts_as_the_identity(layernorm: str | None, backend: str) -> None:
    x, other = randn(3, 5, D), randn(3, 5, D, seed=1)
    options = {"layernorm": layernorm, "scale": "learnable", "activation": "gelu"}
    with fastadapters.backend(backend):
        module = BottleneckAdapter(D, 7, **options)
        assert torch.equal(module(x), x)
        assert torch.equal(module(x, other), other)
        module = BottleneckAdapter(D, 7, residual=False, **options)
        assert torch.equal(module(x), torch.zeros_like(x))


def check_std(weight: Tensor, std: float) -> None:
    """Within five standard errors of a normal sample's standard deviation."""
    assert abs(weight.std().item() / std - 1) <= 5 / (2 * weight.numel()) ** 0.5


def test_init_lora() -> None:
    """Kaiming-uniform with a = sqrt(5): all of [-D ** -0.5, D ** -0.5]."""
    module = BottleneckAdapter(256, 64, init="lora")
    down, bound = module.down_proj.weight, 256**-0.5
    assert down.abs().max() <= bound
    check_std(down, bound / 3**0.5)
    assert not module.up_proj.weight.any()


def test_init_houlsby() -> None:
    """Normal of standard deviation 0.01, cut off at two of these."""
    module = BottleneckAdapter(256, 64, init="houlsby")
    inside = math.erf(2**0.5)
    density = math.exp(-2.0) / (2 * math.pi) ** 0.5
    for layer in (module.down_proj, module.up_proj):
        assert layer.weight.abs().max() <= torch.tensor(0.02)
        check_std(layer.weight, 0.01 * (1 - 4 * density / inside) ** 0.5)


def test_init_bert() -> None:
    module = BottleneckAdapter(256, 64, init="bert")
    for layer in (module.down_proj, module.up_proj):
        assert layer.weight.abs().max() > 0.04
        check_std(layer.weight, 0.02)


@pytest.mark.parametrize("init", ["lora", "houlsby", "bert"])
@pytest.mark.parametrize(("scale", "size"), [("learnable", 1), ("channel", D)])
def test_init_of_biases_norm_and_scale(init: str, scale: str, size: int) -> None:
    module = BottleneckAdapter(D, 7, init=init, scale=scale, layernorm="in")
    assert torch.equal(module.scale, torch.ones(size))
    assert torch.equal(module.adapter_layer_norm_before.weight, torch.ones(D))
    for layer in (module.down_proj, module.up_proj, module.adapter_layer_norm_before):
        assert not layer.bias.any()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": lambda z: z.clamp_min(0.0),
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
    "gelu_tanh": lambda z: z * (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2,
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "quick_gelu": lambda z: z / (1 + torch.exp(-1.702 * z)),
}


class Formula(nn.Module):
    """The formula of `BottleneckAdapter` on the parameters of one, written out."""

    def __init__(self, adapter: BottleneckAdapter) -> None:
        super().__init__()
        for name, child in adapter.named_children():
            self.add_module(name, child)
        self.scale = adapter.scale
        self.options = adapter.layernorm, adapter.residual, adapter.activation

    def norm(self, x: Tensor) -> Tensor:
        norm = self.adapter_layer_norm_before
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        return (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias

    def project(self, layer: nn.Linear, x: Tensor) -> Tensor:
        y = x @ layer.weight.T
        return y if layer.bias is None else y + layer.bias

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        layernorm, adds_x, activation = self.options
        z = self.project(self.down_proj, self.norm(x) if layernorm == "in" else x)
        y = self.scale * self.project(self.up_proj, ACTIVATIONS[activation](z))
        y = self.norm(y) if layernorm == "out" else y
        if residual is None and adds_x:
            residual = x
        return y if residual is None else y + residual


# Every value of every option, each layernorm with each residual; True stands for the module's own,
# "other" for one given to forward.
OPTIONS = [
    {"layernorm": layernorm, "residual": residual, "scale": scale, "activation": activation}
    for (layernorm, residual), scale, activation in zip(
        itertools.product((None, "in", "out"), (True, False, "other")),
        itertools.cycle((0.6, "learnable", "channel", "learnable")),
        itertools.cycle(ACTIVATIONS),
        strict=False,
    )
] + [
    {"layernorm": "in", "residual": True, "scale": "channel", "bias": False},
    {"layernorm": "out", "residual": "other", "scale": 0.6, "bias": False},
]


def adapter_and_tensors(
    options: dict[str, Any], shape: tuple[int, ...], r: int
) -> tuple[BottleneckAdapter, dict[str, Tensor]]:
    explicit = options["residual"] == "other"
    adapter = BottleneckAdapter(shape[-1], r, **{**options, "residual": bool(options["residual"])})
    tensors = {"x": randn(*shape)} | ({"residual": randn(*shape, seed=50)} if explicit else {})
    randomize(adapter)
    return adapter, tensors


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_bottleneck_is_its_formula(options: dict[str, Any]) -> None:
    """Output and all gradients in float64."""
    adapter, tensors = adapter_and_tensors(options, (3, 5, D), 7)
    tensors, as_op = with_parameters(adapter, **tensors)
    assert_same_results(as_op(adapter), as_op(Formula(adapter)), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_bottleneck_backends(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """Output and all gradients under the tolerance rule."""
    adapter, tensors = adapter_and_tensors(options, (3, 35, 96), 16)
    tensors, as_op = with_parameters(adapter, **tensors)
    rounded = {name: t.to(dtype) for name, t in tensors.items()}
    check_against_reference(as_op(adapter), rounded, "adapter", backend)


T = 9


class TwoAdapters(nn.Module):
    """What `MultiwayAdapter` stands for: each adapter on its tokens, then a concatenation."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.adaptmlp_vision = BottleneckAdapter(D, 7, **options)
        self.adaptmlp_text = BottleneckAdapter(D, 7, **options)

    def forward(self, x: Tensor, split: int, residual: Tensor | None = None) -> Tensor:
        split = x.shape[1] if split == -1 else split
        halves = []
        for adapter, part in (
            (self.adaptmlp_vision, slice(None, split)),
            (self.adaptmlp_text, slice(split, None)),
        ):
            halves.append(adapter(x[:, part], None if residual is None else residual[:, part]))
        return torch.cat(halves, dim=1)


MULTIWAY_OPTIONS = [
    {"activation": "gelu", "scale": "learnable"},
    {"layernorm": "in", "scale": "channel", "residual": False},
    {"layernorm": "out", "scale": 0.6},
    {"layernorm": "out", "residual": False},
]


def multiway_tensors(module: nn.Module, explicit: bool) -> Any:
    residual = {"residual": randn(3, T, D, seed=50)} if explicit else {}
    return with_parameters(randomize(module), x=randn(3, T, D), **residual)


@pytest.mark.parametrize("split", [-1, 0, 1, 4, T])
@pytest.mark.parametrize("explicit", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("options", MULTIWAY_OPTIONS, ids=str)
def test_multiway_is_two_adapters(options: dict[str, Any], explicit: bool, split: int) -> None:
    """Output and all gradients in float64."""
    module = MultiwayAdapter(D, 7, **options)
    tensors, as_op = multiway_tensors(module, explicit)
    assert_same_results(as_op(module, split), as_op(TwoAdapters(**options), split), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("explicit", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("options", MULTIWAY_OPTIONS, ids=str)
def test_multiway_backends(
    options: dict[str, Any], explicit: bool, dtype: torch.dtype, backend: str
) -> None:
    """Output and all gradients under the tolerance rule."""
    module = MultiwayAdapter(D, 7, **options)
    tensors, as_op = multiway_tensors(module, explicit)
    rounded = {name: t.to(dtype) for name, t in tensors.items()}
    check_against_reference(as_op(module, 4), rounded, "multiway", backend)


def test_modalities_name_the_adapters() -> None:
    """The first name has the first tokens, whatever the names."""
    module = MultiwayAdapter(D, 7, modalities=("image", "audio"))
    randomize(module)
    assert [name for name, _ in module.named_children()] == ["adaptmlp_image", "adaptmlp_audio"]
    x = randn(3, T, D)
    assert torch.equal(module(x, -1), module.adaptmlp_image(x))
    assert torch.equal(module(x, 0), module.adaptmlp_audio(x))


def enhanced(module: AlignmentEnhancer, x: Tensor) -> Tensor:
    """The block's branch, written out."""
    hidden = ACTIVATIONS[module.activation](x @ module.fc1.weight.T + module.fc1.bias)
    return hidden @ module.fc2.weight.T + module.fc2.bias


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_enhancer_is_its_formula(activation: str, backend: str) -> None:
    module = sample("enhancer", torch.float64, activation=activation)
    x = randn(3, 5, D, dtype=torch.float64)
    with fastadapters.backend(backend):
        assert_exact(module(x), x + enhanced(module, x))


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


MASKS = [
    ("masked", ((-INF, 0.0), (0.0, -INF))),
    ("additive", ((0.0, 1.0), (1.0, 0.0))),
    (((0.5, -1.0), (-INF, 2.0)),) * 2,
]


def published(module: MultiModalAdapter, tokens: Tensor, bias: Any) -> Tensor:
    """The published forward pass: `torch.nn.MultiheadAttention` with a mask of numbers."""
    modality = torch.tensor([0] * (len(tokens) - 1) + [1])
    mask = torch.tensor(bias, dtype=tokens.dtype)[modality[:, None], modality]
    x = module.downsampler(tokens)
    out: Tensor = module.upsampler(module.mha(x, x, x, attn_mask=mask, need_weights=False)[0])
    return out


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize(("mask", "bias"), MASKS)
@pytest.mark.parametrize("per_item", [False, True])
@pytest.mark.parametrize(
    ("down", "up"), [("linear", "linear"), ("factored", "mlp"), ("mlp", "mlp")]
)
def test_multimodal_is_the_published_one(
    down: str, up: str, per_item: bool, mask: Any, bias: Any, backend: str
) -> None:
    module = sample("multimodal", torch.float64, downsample=down, upsample=up, mask=mask)
    text, image = inputs("multimodal", torch.float64)
    texts = text.expand(3, 6, D)
    if per_item:
        text = texts = randn(3, 6, D, seed=7, dtype=torch.float64)
    tokens = torch.cat([texts.transpose(0, 1), image[None]])
    with fastadapters.backend(backend):
        new_text, new_image = module(text, image)
        sequence = module.forward_sequence(tokens)
    expected = published(module, tokens, bias)
    assert_exact(sequence, expected)
    assert_exact(new_text, expected[:-1].transpose(0, 1))
    assert_exact(new_image, expected[-1])


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("mask", ["masked", "additive", ((0.5, -1.0), (-1.0, 2.0))])
@pytest.mark.parametrize("adapt", ["both", "image", "text"])
def test_logits(adapt: str, mask: Any, backend: str) -> None:
    """[B, C]: cosines of the blends of what CLIP and the adapter give."""
    module = sample("multimodal", torch.float64, mask=mask, blend=0.3)
    text, image = inputs("multimodal", torch.float64)
    with fastadapters.backend(backend):
        got = module.logits(text, image, 50.0, adapt=adapt)
        new_text, new_image = module(text, image)
    unit = partial(F.normalize, dim=-1)
    text = unit(text).expand_as(new_text)
    image = image if adapt == "image" else unit(image)
    if adapt != "image":
        text = unit(0.3 * unit(new_text) + 0.7 * text)
    if adapt != "text":
        image = 0.3 * unit(new_image) + 0.7 * image
    assert got.shape == (3, 6)
    assert_exact(got, 50 * (unit(image)[:, None] * text).sum(-1))


def test_logits_adapt_both_by_default() -> None:
    module, (text, image) = sample("multimodal"), inputs("multimodal")
    logits = [module.logits(text, image, 50.0, adapt=adapt) for adapt in ("both", "image", "text")]
    assert torch.equal(module.logits(text, image, torch.tensor(50.0)), logits[0])
    for one, other in itertools.combinations(logits, 2):
        assert not torch.equal(one, other)


BAD_MULTIMODAL = [
    (lambda m, t, i: m(t[:, 1:], i), "text: expected [C, D] = [6, 24], got [6, 23]"),
    (lambda m, t, i: m(t.expand(2, 6, D), i), "text: expected [B, C, D] = [3, 6, 24]"),
    (lambda m, t, i: m(t[:0], i), "text: expected [C, D] with C >= 1"),
    (lambda m, t, i: m(t, i[0]), "image: expected [B, D]"),
    (lambda m, t, i: m.logits(t, i, 1.0, adapt="none"), "adapt: expected one of both, text"),
    (lambda m, t, i: m.logits(t, i, torch.ones(2)), "logit_scale: expected one element"),
    (lambda m, t, i: m.logits(t.expand(3, 6, D), i, 1.0), "text: expected [C, D]"),
    (lambda m, t, i: m.forward_sequence(i), "tokens: expected [C + 1, B, D], C >= 1"),
    (lambda m, t, i: m.forward_sequence(i[None]), "tokens: expected [C + 1, B, D], C >= 1"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_MULTIMODAL)
def test_bad_multimodal_input(bad: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        bad(sample("multimodal"), *inputs("multimodal"))


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
    (lambda xs: [xs[0], xs[1][:, 1:]], "inputs[1]: expected [B, T, D] = [3, 7, 24]"),
    (lambda xs: [xs[0][..., 1:], xs[1]], "inputs[0]: expected [B, T, D] = [3, 5, 24]"),
    (lambda xs: [xs[0][0], xs[1]], "inputs[0]: expected [B, T, D], only B may be 0, got [5, 24]"),
    (lambda xs: [xs[0], xs[1][1:]], "inputs[1]: expected [B, T, D] = [3, 7, 24], got [2, 7, 24]"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_WANDER)
def test_bad_wander_input(bad: Callable[[list[Tensor]], list[Tensor]], message: str) -> None:
    module = WanderAdapter(D, (5, 7), 6, feature_rank=2, time_rank=3, out_len=4)
    with pytest.raises(ValueError, match=re.escape(message)):
        module(bad(inputs("wander")))

"""What holds for every module: names of parameters, copies, devices, dtypes."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from module_cases import (
    BACKENDS,
    KINDS,
    PLAIN,
    assert_equal,
    call,
    every_module,
    inputs,
    reset,
    sample,
)
from torch import nn

import fastadapters
from fastadapters import (
    AlignmentEnhancer,
    BottleneckAdapter,
    MultiModalAdapter,
    MultiwayAdapter,
    WanderAdapter,
)

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")


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
    """Under bf16 activations bf16 outputs, under autocast as published; gradients as their leaf."""
    module = sample(kind, **options)
    tensors = inputs(kind, torch.float32 if autocast else torch.bfloat16)
    leaves = [*(t.requires_grad_() for t in tensors), *module.parameters()]
    with (
        fastadapters.backend(backend),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        outs = call(module, tensors)
    if not autocast:
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


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in KINDS),
        ("multimodal", {"mask": "additive"}),
        ("enhancer", {"drop_path": 1.0}),
    ],
)
def test_outputs_are_the_callers(kind: str, options: dict[str, Any]) -> None:
    """CLIP users divide features in place by their length: no output is a view that tells."""
    module, tensors = sample(kind, **options), inputs(kind)
    before = [t.clone() for t in tensors]
    with torch.no_grad():
        for f in call(module, tensors):
            expected = f / f.norm(dim=-1, keepdim=True)
            f /= f.norm(dim=-1, keepdim=True)
            assert torch.equal(f, expected)
    assert_equal(tensors, before)
    for f in call(module, [t.requires_grad_() for t in tensors]):
        f *= 2
        f.sum().backward(retain_graph=True)


@pytest.mark.parametrize("backend", [*PLAIN, "cpu", "layers"])
@every_module
def test_another_device_than_the_default(kind: str, backend: str) -> None:
    """As under `torch.set_default_device`: what is made on the way is made where the inputs are."""
    if backend not in (*BACKENDS, *PLAIN, "layers"):
        pytest.skip("needs the compiled library")
    module, tensors = sample(kind), [t.requires_grad_() for t in inputs(kind)]
    if backend == "layers":
        for layer in module.modules():
            layer.register_forward_hook(lambda m, args, y: y)
    outs = []
    for default in ("cpu", "meta"):
        with fastadapters.backend("auto" if backend == "layers" else backend):  # noqa: SIM117
            with torch.device(default):
                outs.append(call(module, tensors))
                sum(y.sum() for y in outs[-1]).backward()
    assert_equal(*outs)


@every_module
@pytest.mark.parametrize("backend", ["auto", *PLAIN])
@pytest.mark.filterwarnings("ignore")
def test_linearize(kind: str, backend: str) -> None:
    """`torch.func.linearize` keeps what does not depend on the tangent: nothing may write to it."""
    module, tensors = sample(kind), inputs(kind)

    def op(first: torch.Tensor) -> torch.Tensor:
        return call(module, [first, *tensors[1:]])[-1]

    with fastadapters.backend(backend):
        y, along = torch.func.linearize(op, tensors[0])
        tangent = torch.ones_like(tensors[0])
        expected, along_tangent = torch.func.jvp(op, (tensors[0],), (tangent,))
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(along(tangent), along_tangent, rtol=1e-4, atol=1e-4)

"""Bad options and inputs of the modules raise, naming the argument."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from module_cases import (
    BACKENDS,
    INF,
    KINDS,
    D,
    assert_equal,
    call,
    every_module,
    inputs,
    sample,
)
from torch import nn

import fastadapters
from fastadapters import MultiModalAdapter

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")


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
    (
        "multiway",
        {"modalities": ("text", "text")},
        ValueError,
        "modalities: expected different names",
    ),
    ("multiway", {"modalities": ("text",)}, ValueError, "modalities: expected different names"),
    ("multiway", {"init": "zeros"}, ValueError, "init: expected one of lora, houlsby"),
    ("multiway", {"modalities": ("a.b", "c")}, ValueError, "modalities: expected different names"),
    ("multiway", {"modalities": "ab"}, ValueError, "modalities: expected different names"),
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
    ("wander", {"fusion": "sum"}, ValueError, "fusion: expected one of cp, summed, got 'sum'"),
    ("wander", {"fusion": "cp"}, ValueError, "time_rank: expected feature_rank = 2 with 'cp'"),
    ("wander", {"init": "lora"}, ValueError, "init: expected one of trainable, published"),
    ("wander", {"out_len": 0}, ValueError, "out_len: expected at least 1, got 0"),
    ("wander", {"out_len": 13}, ValueError, "out_len: expected at most 12 (all tokens), got 13"),
]
POSITIONAL = {"dim": 0, "bottleneck": 1, "hidden_dim": 1, "num_heads": 2}


def build(kind: str, change: dict[str, Any]) -> nn.Module:
    """The module of that kind with some options another way."""
    make = KINDS[kind][0]
    assert isinstance(make, partial)
    args, options = list(make.args), dict(make.keywords)
    for name, value in change.items():
        if name in POSITIONAL:
            args[POSITIONAL[name]] = value
        else:
            options[name] = value
    return make.func(*args, **options)


@pytest.mark.parametrize(("kind", "change", "error", "message"), BAD_OPTIONS)
def test_bad_options(kind: str, change: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        build(kind, change)


NUMBERS = [
    ("bottleneck", {"scale": 0.5, "dropout": 0.25, "dim": 24, "bottleneck": 7}),
    ("multiway", {"scale": 0.5, "dropout": 0.25, "dim": 24, "bottleneck": 7}),
    ("enhancer", {"dropout": 0.25, "drop_path": 0.5, "hidden_dim": 40}),
    ("multimodal", {"blend": 0.5, "num_heads": 2, "mask": ((0.5, -1.0), (-INF, 2.0))}),
    ("wander", {"out_len": 4, "feature_rank": 2, "time_rank": 2}),
]


@pytest.mark.parametrize("make", [np.float32, np.float64, torch.tensor])
@pytest.mark.parametrize(("kind", "options"), NUMBERS)
def test_numbers_of_any_kind(kind: str, options: dict[str, Any], make: Callable[..., Any]) -> None:
    """NumPy's and 0-dim tensors are numbers: the module is the one that plain numbers make."""

    def convert(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(convert(v) for v in value)
        if isinstance(value, int):
            return torch.tensor(value) if make is torch.tensor else np.int64(value)
        return make(value)

    expected = build(kind, options)
    module = build(kind, {name: convert(value) for name, value in options.items()})
    module.load_state_dict(expected.state_dict())
    assert repr(module) == repr(expected)
    assert_equal(call(module.eval(), inputs(kind)), call(expected.eval(), inputs(kind)))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the compiled library")
@every_module
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_freed_memory(kind: str, when: str) -> None:
    """What shards parameters frees their memory: that they are read too late must not crash."""
    options = {"layernorm": None, "scale": 1.0} if kind == "multiway" else {}  # all in one op

    def built() -> tuple[nn.Module, list[torch.Tensor]]:
        return sample(kind, **options), [t.requires_grad_() for t in inputs(kind)]

    def leaves(module: nn.Module, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        read = [*module.parameters(), *tensors]
        return read if when == "forward" else [t for t in read if t.dim() > 1]

    def result(module: nn.Module, tensors: list[torch.Tensor]) -> torch.Tensor:
        with fastadapters.backend("cpu"):  # plain PyTorch checks some of its operands alone
            if isinstance(module, MultiModalAdapter):
                return module.logits(*tensors, 1.0)
            return call(module, tensors)[0]

    for n in range(len(leaves(*built()))):
        module, tensors = built()
        y = result(module, tensors) if when == "backward" else None
        leaves(module, tensors)[n].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=r"memory is not freed|out of bounds for storage"):
            (result(module, tensors) if y is None else y).sum().backward()

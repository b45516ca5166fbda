"""Bad input raises before anything runs, naming the argument, what was expected and what given."""

from __future__ import annotations

import re

import pytest
import torch

import fastadapters
from fastadapters import backends
from fastadapters.functional import bottleneck


def good() -> dict[str, object]:
    return {
        "x": torch.randn(4, 8),
        "down_weight": torch.randn(3, 8),
        "up_weight": torch.randn(8, 3),
    }


BAD = [
    ({"x": [1.0]}, TypeError, "x: expected a floating-point tensor [..., D], got list"),
    ({"x": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "got torch.int64"),
    ({"x": torch.tensor(1.0)}, ValueError, "x: expected [..., D] with D >= 1, got []"),
    ({"x": torch.ones(4, 0)}, ValueError, "x: expected [..., D] with D >= 1, got [4, 0]"),
    ({"x": torch.ones(4, 9)}, ValueError, "down_weight: expected [r, D] = [3, 9], got [3, 8]"),
    ({"down_weight": None}, TypeError, "down_weight: expected a tensor [r, D], got NoneType"),
    ({"down_weight": torch.ones(8)}, ValueError, "down_weight: expected [r, D]"),
    ({"down_weight": torch.ones(0, 8)}, ValueError, "r >= 1, got [0, 8]"),
    ({"down_weight": torch.ones(3, 8, dtype=torch.int8)}, TypeError, "down_weight: expected a fl"),
    (
        {"up_weight": torch.ones(3, 8)},
        ValueError,
        "up_weight: expected [D, r] = [8, 3], got [3, 8]",
    ),
    ({"up_weight": 1.0}, TypeError, "up_weight: expected a tensor [D, r], got float"),
    ({"up_weight": torch.ones(8, 3, device="meta")}, ValueError, "up_weight: expected a tensor on"),
    ({"down_bias": torch.ones(8)}, ValueError, "down_bias: expected [r] = [3], got [8]"),
    ({"up_bias": torch.ones(1, 8)}, ValueError, "up_bias: expected [D] = [8], got [1, 8]"),
    ({"norm_weight": torch.ones(3)}, ValueError, "norm_weight: expected [D] = [8], got [3]"),
    ({"norm_bias": torch.ones(8)}, ValueError, "norm_bias: expected None without norm_weight"),
    (
        {"norm_weight": torch.ones(8), "norm_bias": torch.ones(7)},
        ValueError,
        "norm_bias: expected [D] = [8], got [7]",
    ),
    ({"residual": torch.ones(4, 7)}, ValueError, "residual: expected the shape of x = [4, 8]"),
    (
        {"residual": torch.ones(8)},
        ValueError,
        "residual: expected the shape of x = [4, 8], got [8]",
    ),
    ({"scale": torch.ones(3)}, ValueError, "scale: expected [1] or [D] = [8], got [3]"),
    ({"scale": torch.tensor(1.0)}, ValueError, "scale: expected [1] or [D] = [8], got []"),
    ({"scale": "0.1"}, TypeError, "scale: expected a number or a tensor, got str"),
    ({"scale": torch.ones(1, dtype=torch.int32)}, TypeError, "scale: expected a floating-point"),
    ({"activation": "tanh"}, ValueError, "activation: expected one of identity, relu"),
    ({"activation": None}, ValueError, "activation: expected one of"),
    ({"dropout": -0.1}, ValueError, "dropout: expected a probability in [0, 1], got -0.1"),
    ({"dropout": 1.5}, ValueError, "dropout: expected a probability in [0, 1], got 1.5"),
    ({"dropout": float("nan")}, ValueError, "dropout: expected a probability"),
]


@pytest.mark.parametrize("name", ["reference", "auto"])
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_input(change: dict[str, object], error: type, message: str, name: str) -> None:
    with fastadapters.backend(name), pytest.raises(error, match=re.escape(message)):
        bottleneck(**{**good(), **change})


def test_unknown_backend() -> None:
    message = "name: expected one of auto, reference, eager"
    with pytest.raises(ValueError, match=message), fastadapters.backend("gpu"):
        pass


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_named_backend_that_cannot_run_says_why(name: str) -> None:
    with fastadapters.backend(name), pytest.raises(RuntimeError, match=f"'{name}' cannot run"):
        bottleneck(**good())


@pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="needs the compiled library")
def test_float64_is_not_for_fused_kernels() -> None:
    double = {k: v.double() for k, v in good().items()}
    with fastadapters.backend("cpu"), pytest.raises(RuntimeError, match=r"not torch\.float64"):
        bottleneck(**double)
    decision = fastadapters.explain(bottleneck, **double)[0]
    assert decision.backend == "eager"
    assert "not cpu: it takes float32" in decision.reason


def test_explain_names_the_backend() -> None:
    with fastadapters.backend("reference"):
        decisions = fastadapters.explain(bottleneck, **good())
    assert decisions == [("bottleneck", "reference", "chosen by name")]

"""Bad input raises before anything runs, naming the argument, what was expected and what given."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastadapters
from fastadapters import backends
from fastadapters.functional import (
    BottleneckParameters,
    bottleneck,
    cross_modal_attention,
    multiway_bottleneck,
)


def good() -> dict[str, object]:
    return {
        "x": torch.randn(4, 8),
        "down_weight": torch.randn(3, 8),
        "up_weight": torch.randn(8, 3),
    }


BAD = [
    ({"x": [1.0]}, TypeError, "x: expected a floating-point tensor [..., D_in], got list"),
    ({"x": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "got torch.int64"),
    ({"x": torch.tensor(1.0)}, ValueError, "x: expected [..., D_in] with D_in >= 1, got []"),
    ({"x": torch.ones(4, 0)}, ValueError, "x: expected [..., D_in] with D_in >= 1, got [4, 0]"),
    ({"x": torch.ones(4, 9)}, ValueError, "down_weight: expected [r, D_in] = [3, 9], got [3, 8]"),
    (
        {"down_weight": None},
        TypeError,
        "down_weight: expected a floating-point tensor [r, D_in], got NoneType",
    ),
    ({"down_weight": torch.ones(8)}, ValueError, "down_weight: expected [r, D_in]"),
    ({"down_weight": torch.ones(0, 8)}, ValueError, "r >= 1, got [0, 8]"),
    ({"down_weight": torch.ones(3, 8, dtype=torch.int8)}, TypeError, "down_weight: expected a fl"),
    (
        {"up_weight": torch.ones(3, 8)},
        ValueError,
        "up_weight: expected [D_out, r] = [3, 3], got [3, 8]",
    ),
    (
        {"up_weight": 1.0},
        TypeError,
        "up_weight: expected a floating-point tensor [D_out, r], got float",
    ),
    ({"up_weight": torch.ones(8, 3, device="meta")}, ValueError, "up_weight: expected a tensor on"),
    ({"down_bias": torch.ones(8)}, ValueError, "down_bias: expected [r] = [3], got [8]"),
    ({"up_bias": torch.ones(1, 8)}, ValueError, "up_bias: expected [D_out] = [8], got [1, 8]"),
    ({"norm_weight": torch.ones(3)}, ValueError, "norm_weight: expected [D_in] = [8], got [3]"),
    ({"norm_bias": torch.ones(8)}, ValueError, "norm_bias: expected None without norm_weight"),
    (
        {"norm_weight": torch.ones(8), "norm_bias": torch.ones(7)},
        ValueError,
        "norm_bias: expected [D_in] = [8], got [7]",
    ),
    ({"residual": torch.ones(4, 7)}, ValueError, "residual: expected the shape of x = [4, 8]"),
    (
        {"residual": torch.ones(8)},
        ValueError,
        "residual: expected the shape of x = [4, 8], got [8]",
    ),
    ({"scale": torch.ones(3)}, ValueError, "scale: expected [1] or [D_out] = [8], got [3]"),
    ({"scale": torch.ones(1, 1)}, ValueError, "scale: expected [1] or [D_out] = [8], got [1, 1]"),
    ({"scale": torch.tensor(True)}, TypeError, "scale: expected a number or a tensor, got Tensor"),
    ({"scale": True}, TypeError, "scale: expected a number or a tensor, got bool"),
    ({"scale": 1j}, TypeError, "scale: expected a number or a tensor, got complex"),
    ({"scale": "0.1"}, TypeError, "scale: expected a number or a tensor, got str"),
    ({"scale": torch.ones(1, dtype=torch.int32)}, TypeError, "scale: expected a floating-point"),
    ({"activation": "tanh"}, ValueError, "activation: expected one of identity, relu"),
    ({"activation": None}, ValueError, "activation: expected one of"),
    ({"dropout": -0.1}, ValueError, "dropout: expected a probability in [0, 1], got -0.1"),
    ({"dropout": 1.5}, ValueError, "dropout: expected a probability in [0, 1], got 1.5"),
    ({"dropout": float("nan")}, ValueError, "dropout: expected a probability"),
    ({"dropout": "0.1"}, TypeError, "dropout: expected a number, got str"),
    ({"dropout": None}, TypeError, "dropout: expected a number, got NoneType"),
    ({"dropout": True}, TypeError, "dropout: expected a number, got bool"),
    (
        {"dropout": torch.tensor(0.1, requires_grad=True)},
        ValueError,
        "dropout: expected a number, got a tensor that requires grad",
    ),
    ({"norm_eps": -1.0}, ValueError, "norm_eps: expected a finite number of at least 0, got -1.0"),
    ({"norm_eps": float("nan")}, ValueError, "norm_eps: expected a finite number of at least 0"),
    ({"norm_eps": float("inf")}, ValueError, "norm_eps: expected a finite number of at least 0"),
    ({"norm_eps": "1e-5"}, TypeError, "norm_eps: expected a number, got str"),
    ({"training": "x"}, TypeError, "training: expected True or False, got 'x'"),
    ({"training": 1}, TypeError, "training: expected True or False, got 1"),
]


@pytest.mark.parametrize("name", ["reference", "auto"])
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_input(change: dict[str, object], error: type, message: str, name: str) -> None:
    with fastadapters.backend(name), pytest.raises(error, match=re.escape(message)):
        bottleneck(**{**good(), **change})


@pytest.mark.parametrize(
    "number", [np.float32, np.float64, np.float16, np.int64, torch.tensor, int]
)
@pytest.mark.parametrize("option", ["scale", "norm_eps", "dropout"])
@pytest.mark.parametrize("name", ["reference", "eager", "auto"])
def test_numbers_of_any_kind(name: str, option: str, number: Callable[[float], Any]) -> None:
    """NumPy's scalars and tensors without a dimension do as Python's numbers do."""
    value = 1 if number in (int, np.int64) else 0.5
    norm = {"norm_weight": torch.ones(8)}
    results = []
    for given in (number(value), value):
        torch.manual_seed(0)
        with fastadapters.backend(name):
            results.append(bottleneck(**good(), **norm, training=True, **{option: given}))
        torch.testing.assert_close(results[0], results[-1])


def test_a_scale_without_dimension_is_learnable() -> None:
    arguments = good()
    for name in ("reference", "eager", "auto"):
        for dtype in (torch.float32, torch.float64):
            scale = torch.tensor(0.5, dtype=dtype, requires_grad=True)
            with fastadapters.backend(name):
                y = bottleneck(**arguments, scale=scale)
                (got,) = torch.autograd.grad(y.sum(), scale)
            assert got.shape == () and got.dtype == dtype
            unit = bottleneck(**arguments)
            torch.testing.assert_close(got, unit.sum().to(dtype), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(y, 0.5 * unit)
    with torch.autocast("cpu", torch.bfloat16):
        assert bottleneck(**arguments, scale=torch.tensor(0.5)).dtype == torch.bfloat16


def test_numbers_of_the_other_ops() -> None:
    sides = [BottleneckParameters(torch.randn(3, 8), torch.randn(8, 3)) for _ in range(2)]
    x = torch.randn(2, 4, 8)
    expected = multiway_bottleneck(x, 2, *sides)
    for split in (np.int64(2), torch.tensor(2)):
        assert torch.equal(multiway_bottleneck(x, split, *sides), expected)
    halved = [side._replace(scale=np.float32(0.5)) for side in sides]
    torch.testing.assert_close(multiway_bottleneck(x, 2, *halved), 0.5 * expected)
    for bad in (2.0, "2", True, None):
        with pytest.raises(TypeError, match="split: expected an integer, got"):
            multiway_bottleneck(x, bad, *sides)
    qkv = [torch.randn(3, 2, 4) for _ in range(3)] + [torch.randn(5, 1, 2, 4) for _ in range(3)]
    zero, one = np.float32(0.0), torch.tensor(1.0)
    results = [
        cross_modal_attention(*qkv, bias=bias, scale=scale)
        for bias, scale in (
            (((zero, one), (one, zero)), np.float32(0.5)),
            (((0, 1), (1, 0)), 0.5),
        )
    ]
    torch.testing.assert_close(*results)
    with pytest.raises(TypeError, match="scale: expected a number or None, got str"):
        cross_modal_attention(*qkv, scale="1")


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

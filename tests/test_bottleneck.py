"""Every backend of the bottleneck that can run here, against the reference."""

from __future__ import annotations

import pytest
import torch
from bottleneck_cases import (
    DTYPES,
    Case,
    check_backend,
    inputs,
    option_cases,
    rectangular_cases,
    reference_pair,
    run,
    shape_cases,
)
from compare import check_all
from hypothesis import given, settings
from hypothesis import strategies as st

import fastadapters
from fastadapters import backends, functional, reference

BACKENDS = ["eager"] + [name for name in ("cpu",) if backends.unavailable(name) is None]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*option_cases(), *rectangular_cases()], ids=str)
def test_options(case: Case, dtype: torch.dtype, backend: str) -> None:
    check_backend(Case(**{**case.__dict__, "dtype": dtype}), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", shape_cases(), ids=str)
def test_shapes(case: Case, dtype: torch.dtype, backend: str) -> None:
    check_backend(Case(**{**case.__dict__, "dtype": dtype}), backend)


@pytest.mark.parametrize("param_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(dtype: torch.dtype, param_dtype: torch.dtype, backend: str) -> None:
    case = Case(
        dtype=dtype, param_dtype=param_dtype, norm="both", scale="channel", residual="other"
    )
    tensors = inputs(case)
    check_backend(case, backend)
    out = run(case, tensors, backend)
    assert out["y"].dtype == dtype
    assert out["d_x"].dtype == dtype
    assert out["d_down_weight"].dtype == out["d_scale"].dtype == param_dtype


cases = st.builds(
    Case,
    rows=st.lists(st.integers(0, 40), min_size=0, max_size=4).map(tuple),
    d=st.integers(1, 200),
    d_out=st.none() | st.integers(1, 200),
    r=st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
    param_dtype=st.sampled_from((None, *DTYPES)),
    activation=st.sampled_from(("relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "identity")),
    down_bias=st.booleans(),
    up_bias=st.booleans(),
    scale=st.sampled_from(("number", "learnable", "channel")),
    residual=st.sampled_from(("x", "other", "none")),
    norm=st.sampled_from(("none", "weight", "both")),
    dropout=st.sampled_from((0.0, 0.1, 0.5)),
    input_dropout=st.sampled_from((0.0, 0.1, 0.5)),
    layout=st.sampled_from(("contiguous", "slice", "transposed", "strided")),
).filter(
    # The norm of one or two channels is a constant: its gradient is 0, and all that is computed is
    # a rounding error times 1 / sqrt(eps). `shape_cases` has one channel.
    lambda case: (
        torch.Size(case.rows).numel() <= 2000
        and (case.norm == "none" or case.d > 2)
        # x itself is a residual of its own width only.
        and (case.residual != "x" or case.d_out in (None, case.d))
    )
)


@settings(max_examples=100)
@given(case=cases, seed=st.integers(0, 2**16))
def test_any_combination(case: Case, seed: int) -> None:
    for name in BACKENDS:
        check_backend(case, name, seed)


NAMES = ["x", "down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias"]
NAMES += ["scale", "residual"]


@pytest.mark.parametrize("wanted", [*([n] for n in NAMES), ["x", "up_weight"], NAMES[1:]], ids=str)
@pytest.mark.parametrize("residual", ["x", "other"])
def test_only_the_gradients_asked_for(wanted: list[str], residual: str, backend: str) -> None:
    case = Case(norm="both", scale="learnable", residual=residual)
    tensors = inputs(case)
    needs = {name for name in wanted if name in tensors}
    out = run(case, tensors, backend, needs=needs.__contains__)
    assert out.keys() == {"y", *(f"d_{name}" for name in needs)}
    check_all(out, reference_pair(case, tensors, needs=needs.__contains__))


def test_large_mean_under_layernorm(backend: str) -> None:
    """mean^2 is 10^4 times the variance: the folded LayerNorm must not cancel."""
    case = Case(norm="both", residual="none")
    tensors = inputs(case)
    tensors["x"] = tensors["x"] + 100.0
    check_all(run(case, tensors, backend), reference_pair(case, tensors))


def test_sums_over_rows_of_short_runs() -> None:
    """Rows that lie in memory by fours: sums over all rows are no longer chains for that."""
    case = Case(rows=(40, 40, 4), d=8, r=4, scale="channel", layout="transposed")
    check_backend(case, "cpu")


def test_equal_bits_from_run_to_run(backend: str) -> None:
    case = Case(rows=(700,), d=128, r=48, norm="both", scale="channel", dropout=0.1)
    tensors = inputs(case)
    first, second = run(case, tensors, backend), run(case, tensors, backend)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_dropout_zeroes_the_specified_elements(backend: str) -> None:
    """With identity weights y is h itself: the pattern of zeros must be Philox's, bit for bit."""
    m, r = 67, 32
    x = torch.ones(m, r)
    torch.manual_seed(3)
    seed = torch.randint(2**62, (2,))
    torch.manual_seed(3)
    with fastadapters.backend(backend):
        y = functional.bottleneck(
            x, torch.eye(r), torch.eye(r), activation="identity", dropout=0.3, training=True
        )
    expected = reference.philox.dropout_multiplier(seed, m, r, 0.3, torch.float32)
    assert torch.equal(y, expected)
    assert 0.25 < (y == 0).float().mean() < 0.35


def test_dropout_is_off_in_evaluation(backend: str) -> None:
    x, wd, wu = torch.randn(5, 16), torch.randn(4, 16), torch.randn(16, 4)
    with fastadapters.backend(backend):
        assert torch.equal(
            functional.bottleneck(x, wd, wu, dropout=0.5), functional.bottleneck(x, wd, wu)
        )


TINY = {"dtype": torch.float64, "rows": (2, 3), "d": 5, "r": 4}


@pytest.mark.parametrize("name", ["reference", "eager"])
@pytest.mark.parametrize("case", [*option_cases(**TINY), *rectangular_cases(**TINY)], ids=str)
def test_gradcheck(case: Case, name: str) -> None:
    if 1.0 in (case.dropout, case.input_dropout) or case.layout != "contiguous":
        pytest.skip("covered in float32")
    tensors = inputs(case)
    tensors.pop("cotangent")
    names = list(tensors)

    def fn(*values: torch.Tensor) -> torch.Tensor:
        arguments = dict(zip(names, values, strict=True))
        if case.residual == "x":
            arguments["residual"] = arguments["x"]
        if case.scale == "number":
            arguments["scale"] = 0.6
        torch.manual_seed(1)
        with fastadapters.backend(name):
            return functional.bottleneck(
                **arguments, activation=case.activation, dropout=case.dropout,
                input_dropout=case.input_dropout, training=True,
            )  # fmt: skip

    leaves = tuple(t.clone().requires_grad_() for t in tensors.values())
    assert torch.autograd.gradcheck(fn, leaves)
    assert torch.autograd.gradgradcheck(fn, leaves)

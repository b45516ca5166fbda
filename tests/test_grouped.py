"""`functional.grouped_bottleneck`: every backend that runs here, against the reference."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from bottleneck_cases import DTYPES, Case, mixed_cases, option_cases, rectangular_cases
from grouped_cases import ADAPTERS, check_backend, index_of, inputs, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastadapters
from fastadapters import backends, eager
from fastadapters.functional import bottleneck, grouped_bottleneck

BACKENDS = ["eager"] + [name for name in ("cpu",) if backends.unavailable(name) is None]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
OPTIONS = [*option_cases(rows=(6, 17)), *rectangular_cases(rows=(6, 17))]


@pytest.mark.parametrize("case", OPTIONS, ids=str)
@every_backend
def test_options(case: Case, backend: str) -> None:
    """In float32, and each in one of the 16-bit dtypes."""
    narrow = DTYPES[1 + OPTIONS.index(case) % 2]
    for dtype in (torch.float32, narrow):
        check_backend(replace(case, dtype=dtype), index_of(case), backend)


@pytest.mark.parametrize("case", mixed_cases(torch.bfloat16, rows=(6, 17)), ids=str)
@every_backend
def test_mixed_precision(case: Case, backend: str) -> None:
    check_backend(case, index_of(case), backend)


@pytest.mark.parametrize(
    ("rows", "dims"), [((70,), 1), ((5, 40), 2), ((2, 3, 20), 1), ((2, 3, 20), 2), ((2, 3, 9), 3)]
)
@every_backend
def test_index_of_items_and_tokens(rows: tuple[int, ...], dims: int, backend: str) -> None:
    case = Case(rows=rows, d=100, r=33, norm="both", scale="channel", dropout=0.2, layout="slice")
    index = index_of(case, dims).int()
    out = check_backend(case, index, backend)
    for name in ("down_weight", "up_weight", "down_bias", "up_bias", "norm_weight", "norm_bias"):
        gradient = out[f"d_{name}"]
        occurs = [bool((index == n).any()) for n in range(ADAPTERS)]
        assert [bool((g != 0).any()) for g in gradient] == occurs and not occurs[1], name
    assert out["d_scale"][1].eq(0).all()


cases = st.builds(
    Case,
    rows=st.lists(st.integers(0, 12), min_size=1, max_size=3).map(tuple),
    d=st.integers(3, 130),
    r=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(("relu", "gelu", "silu", "identity")),
    down_bias=st.booleans(),
    up_bias=st.booleans(),
    scale=st.sampled_from(("number", "learnable", "channel")),
    residual=st.sampled_from(("x", "other", "none")),
    norm=st.sampled_from(("none", "both")),
    dropout=st.sampled_from((0.0, 0.5)),
    layout=st.sampled_from(("contiguous", "slice", "transposed", "strided")),
)


@settings(max_examples=25)
@given(case=cases, dims=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_any_combination(case: Case, dims: int, seed: int) -> None:
    """In float64 eagerly to the last digits: any error of the walk is larger."""
    case = replace(case, dtype=torch.float64)
    tensors = inputs(case, seed=seed)
    index = index_of(case, min(dims, len(case.rows)), seed=seed)
    gold = run(case, tensors, index, "reference")
    for name, t in run(case, tensors, index, "eager").items():
        torch.testing.assert_close(t, gold[name], rtol=1e-9, atol=1e-9)
    if "cpu" in BACKENDS:
        single = {name: t.float() for name, t in tensors.items()}
        for name, t in run(replace(case, dtype=torch.float32), single, index, "cpu").items():
            torch.testing.assert_close(t.double(), gold[name], rtol=1e-3, atol=2e-3)


def test_the_reference_is_a_bottleneck_for_each_item() -> None:
    case = Case(norm="both", scale="channel", residual="other", dtype=torch.float64)
    tensors = inputs(case)
    tensors.pop("cotangent")
    x, residual = tensors.pop("x"), tensors.pop("residual")
    index = torch.tensor([2, 0, 2])
    with fastadapters.backend("reference"):
        y = grouped_bottleneck(x, index, **tensors, residual=residual)
        for b, n in enumerate(index.tolist()):
            own = {name: t[n] for name, t in tensors.items()}
            torch.testing.assert_close(y[b], bottleneck(x[b], **own, residual=residual[b]))


@every_backend
def test_layernorm_without_eps(backend: str) -> None:
    """Rows of other adapters have no part in an adapter's gradients, not even as NaN."""
    case = Case(rows=(6, 17), d=100, r=33, norm="both")

    def op(*args: Tensor, **options: Any) -> Tensor:
        return grouped_bottleneck(*args, **options | {"norm_eps": 0.0})

    results = [run(case, inputs(case), index_of(case), b, op=op) for b in ("reference", backend)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_one_adapter_for_all_is_the_bottleneck(dtype: torch.dtype, backend: str) -> None:
    """Bit for bit on the CPU kernels, dropout included."""
    case = Case(rows=(3, 70), norm="both", scale="channel", dropout=0.3, dtype=dtype)
    tensors = inputs(case)
    own = {n: t if n in ("x", "cotangent") else t[2] for n, t in tensors.items()}
    index = torch.full((3,), 2)
    grouped = run(case, tensors, index, backend)
    alone = run(case, own, index, backend, op=lambda x, index, **rest: bottleneck(x, **rest))
    for name, t in alone.items():
        g = grouped[name] if name in ("y", "d_x") else grouped[name][2]
        if backend == "cpu":
            assert torch.equal(t, g), name
        else:
            torch.testing.assert_close(t, g, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("adapters", [2, 9])
@every_backend
def test_equal_bits_on_any_number_of_threads(backend: str, adapters: int, threads: int) -> None:
    """Adapters with many rows run on all threads, those with few side by side."""
    case = Case(rows=(12, 60), d=128, r=48, norm="both", scale="channel", dropout=0.1)
    tensors, index = inputs(case, adapters), index_of(case, adapters=adapters)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (run(case, tensors, index, backend) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    torch.testing.assert_close(first, run(case, tensors, index, "reference"), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("wanted", [["x"], ["down_weight"], ["up_bias"], ["scale"], ["residual"]])
@every_backend
def test_only_the_gradients_asked_for(wanted: list[str], backend: str) -> None:
    case = Case(norm="both", scale="learnable", residual="other")
    tensors, index = inputs(case), index_of(case)
    out = run(case, tensors, index, backend, needs=wanted.__contains__)
    whole = run(case, tensors, index, backend)
    assert out.keys() == {"y", *(f"d_{name}" for name in wanted)}
    torch.testing.assert_close(out, {name: whole[name] for name in out})


@pytest.mark.parametrize("case", OPTIONS[:10], ids=str)
def test_nothing_is_read_where_it_would_have_to_be_waited_for(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`eager`'s form for GPUs: right, and it runs on tensors that have no values."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    index = index_of(case)
    check_backend(case, index, "eager")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(t) for name, t in inputs(case).items()}
        run(case, fake, mode.from_tensor(index), "eager")


@pytest.mark.parametrize("backend", ["reference", "all_at_once"])
def test_an_index_that_was_not_looked_at(backend: str) -> None:
    case = Case(rows=(3, 5), norm="both")
    tensors = inputs(case)
    tensors.pop("cotangent")
    x = tensors.pop("x")
    index = torch.tensor([1, ADAPTERS, -1])
    if backend == "reference":
        y = fastadapters.reference.grouped_bottleneck(x, index, **tensors)
    else:
        rows = index.repeat_interleave(5)
        y = eager.grouped.all_at_once(
            x.flatten(0, 1), rows, (None, None), 1.0, tensors, "relu", 1e-5, x.dtype
        ).reshape(x.shape)
    assert [bool(item.isnan().all()) for item in y] == [False, True, True]
    assert y[0].isfinite().all()


def arguments(**changes: object) -> dict[str, object]:
    stacks = {"down_weight": torch.randn(4, 2, 8), "up_weight": torch.randn(4, 8, 2)}
    given = {"x": torch.randn(3, 5, 8), "index": torch.tensor([0, 3, 1]), **stacks}
    return {**given, **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": [0, 1, 2]}, r"index: expected a tensor of int64 or int32, got list"),
        ({"index": torch.rand(3)}, r"index: expected int64 or int32, got torch.float32"),
        ({"index": torch.ones(3, dtype=torch.bool)}, "index: expected int64 or int32, got torch.b"),
        ({"index": torch.tensor([0, 4, 1])}, r"index: expected values in \[0, N\) = .*, got 4"),
        ({"index": torch.tensor([0, -1, 9])}, r"index: expected values in \[0, N\) = .*, got -1"),
        ({"index": torch.tensor([0, 1])}, r"index: expected leading dimensions of x .* got \[2\]"),
        ({"index": torch.tensor(0)}, r"index: expected leading dimensions of x .* got \[\]"),
        ({"index": torch.zeros(3, 5, 8).long()}, r"index: expected leading dimensions of x"),
        ({"index": torch.zeros(3, device="meta").long()}, "index: expected a tensor on cpu"),
        ({"x": torch.randn(8)}, r"x: expected \[B, ..., D_in\]"),
        ({"x": None}, "x: expected a floating-point tensor"),
        ({"down_weight": torch.randn(2, 8)}, r"down_weight: expected \[N, r, D_in\]"),
        ({"down_weight": None}, r"down_weight: expected a floating-point tensor \[N, r, D_in\]"),
        ({"up_weight": torch.randn(4, 2, 8)}, r"up_weight: expected \[N, D_out, r\] = \[4, 2, 2\]"),
        ({"down_bias": torch.randn(2)}, r"down_bias: expected \[N, r\] = \[4, 2\]"),
        ({"up_bias": torch.randn(3, 8)}, r"up_bias: expected \[N, D_out\] = \[4, 8\]"),
        ({"norm_bias": torch.randn(4, 8)}, "norm_bias: expected None without norm_weight"),
        ({"norm_weight": torch.randn(8)}, r"norm_weight: expected \[N, D_in\]"),
        ({"scale": torch.randn(8)}, r"scale: expected \[N\] = \[4\]"),
        ({"scale": torch.randn(4, 2)}, r"scale: expected \[N\] or \[N, D_out\] = \[4, 8\]"),
        ({"residual": torch.randn(3, 8)}, "residual: expected the shape of x"),
        ({"activation": "tanh"}, "activation: expected one of"),
        ({"dropout": 2.0}, "dropout: expected a probability"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(change: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        grouped_bottleneck(**arguments(**change))


def test_empty_batches() -> None:
    for rows, index in (((0, 5), torch.zeros(0).long()), ((3, 0), torch.tensor([0, 1, 2]))):
        case = Case(rows=rows, norm="both", scale="learnable")
        for backend in BACKENDS:
            out = run(case, inputs(case), index, backend)
            assert all(g.eq(0).all() for name, g in out.items())


def test_large_values_stay_with_their_adapter() -> None:
    """What overflows in one adapter's rows leaves the gradients of the others alone."""
    case = Case(rows=(4, 9), residual="none")
    index = torch.tensor([0, 2, 0, 2])
    for backend in BACKENDS:
        tensors = inputs(case)
        clean = run(case, tensors, index, backend)
        tensors["x"][1] = torch.inf
        out = run(case, tensors, index, backend)
        assert torch.equal(out["d_down_weight"][0], clean["d_down_weight"][0]), backend
        assert not out["d_down_weight"][2].isfinite().all()
        assert out["d_down_weight"][1].eq(0).all()


def test_which_backend_runs() -> None:
    tensors: dict[str, Tensor] = arguments()  # type: ignore[assignment]
    (decision,) = fastadapters.explain(lambda: grouped_bottleneck(**tensors))
    assert decision.backend == BACKENDS[-1]
    meta = {name: t.to("meta") for name, t in tensors.items()}
    assert grouped_bottleneck(**meta).shape == (3, 5, 8)


WIDE = "r = 999 is too large for the shared memory of this GPU"
MANY = "N = 60001 adapters are too many for it: at most 60000"
INDICES = "60000 adapters for 3000000 items are beyond its 32-bit indices"


@pytest.mark.parametrize(
    ("adapters", "items", "r", "expected", "refusals"),
    [
        (3, 4, 300, "cuda", {}),
        (3, 4, 999, "triton", {"cuda": WIDE}),
        (60_000, 4, 2, "cuda", {}),
        (60_001, 4, 2, "eager", {"cuda": MANY, "triton": MANY}),
        (60_000, 3_000_000, 2, "eager", {"cuda": INDICES, "triton": INDICES}),
    ],
)
def test_which_backend_runs_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    adapters: int,
    items: int,
    r: int,
    expected: str,
    refusals: dict[str, str],
) -> None:
    """A kernel at any width: plain PyTorch multiplies N times as much."""
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (8, 0))
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        x, index = torch.empty(items, 5, 8), torch.zeros(items, dtype=torch.int64)
        down, up = torch.empty(adapters, r, 8), torch.empty(adapters, 8, r)
        call = partial(grouped_bottleneck, x, index, down, up, residual=x)
        (decision,) = fastadapters.explain(call)
        reasons = [f"not {name}: {why}" for name, why in refusals.items()]
        assert decision.backend == expected
        assert decision.reason.split("; ")[2:] == reasons  # behind "fastest" and "not cpu"
        for name, why in refusals.items():
            with fastadapters.backend(name), pytest.raises(RuntimeError, match=re.escape(why)):
                call()

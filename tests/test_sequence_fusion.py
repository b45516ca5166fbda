"""Low-rank fusion of sequences: definition, eager form, functional layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from against_reference import (
    Tensors,
    check_against_reference,
    check_compiled,
    check_float64,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastadapters
from fastadapters import backends, functional

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("reference", "eager")
FORMS = ["eager"] + [name for name in ("cpu",) if backends.unavailable(name) is None]
GROUPS = ("x", "down_weight", "down_bias", "time_factor", "feature_factor")


def sample(
    lengths: Sequence[int] = (11, 40, 7),
    dims: Sequence[int] = (32, 32, 32),
    *,
    batch: int = 3,
    width: int = 8,
    out_len: int = 8,
    out_dim: int = 32,
    rank: int = 1,
    bias: bool = True,
    residual: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """The tensors of modality i are named ``x i``, ``down_weight i``, ..."""
    gen = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[tuple[int, ...], float]] = {}
    for i, (t, d) in enumerate(zip(lengths, dims, strict=True)):
        shapes[f"x {i}"] = (batch, t, d), 1.0
        shapes[f"down_weight {i}"] = (width, d), d**-0.5
        if bias:
            shapes[f"down_bias {i}"] = (width,), 0.5
        shapes[f"time_factor {i}"] = (rank, t, out_len), t**-0.5
        shapes[f"feature_factor {i}"] = (rank, width, out_dim), width**-0.5
    if residual:
        shapes["residual"] = (batch, out_len, out_dim), 1.0
    return {n: (torch.randn(s, generator=gen) * std).to(dtype) for n, (s, std) in shapes.items()}


def fuse(tensors: Tensors, **options: object) -> Tensor:
    modalities = [name.split()[1] for name in tensors if name.startswith("x ")]
    groups = ([tensors.get(f"{group} {i}") for i in modalities] for group in GROUPS)
    return functional.sequence_fusion(
        *groups,
        **{"residual": tensors.get("residual"), **options},  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("rank", [1, 3])
def test_definition_is_the_sum_of_products(rank: int) -> None:
    """The formula element by element."""
    t = sample((3, 4), (5, 6), batch=2, width=3, out_len=2, out_dim=4, rank=rank).items()
    tensors = {name: value.double() for name, value in t}
    with fastadapters.backend("reference"):
        y = fuse(tensors, activation="gelu")
    h = [
        torch.nn.functional.gelu(
            tensors[f"x {i}"] @ tensors[f"down_weight {i}"].T + tensors[f"down_bias {i}"]
        )
        for i in range(2)
    ]
    for b, o, d in [(0, 0, 0), (1, 1, 3), (0, 1, 2)]:
        expected = float(tensors["residual"][b, o, d])
        for q in range(rank):
            expected += math.prod(
                float(
                    tensors[f"time_factor {i}"][q, :, o]
                    @ h[i][b]
                    @ tensors[f"feature_factor {i}"][q, :, d]
                )
                for i in range(2)
            )
        assert abs(float(y[b, o, d]) - expected) < 1e-12


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 4},
        {"rank": 2, "bias": False, "residual": False},
        {"lengths": (50,), "dims": (40,)},
        {"lengths": (5, 3, 9, 4, 6, 2, 7), "dims": (16,) * 7},
        {"lengths": (20, 30), "dims": (24, 48), "out_len": 5, "out_dim": 64},
        # Fewer tokens than r and T_o: the other order of the two products is the cheaper one.
        {"lengths": (2, 3), "dims": (32, 32), "width": 16, "out_len": 16, "rank": 2},
    ],
    ids=str,
)
def test_matches_reference(options: dict[str, object], dtype: torch.dtype, backend: str) -> None:
    if backend != "eager" and dtype == torch.float64:
        pytest.skip("kernels take no float64")
    tensors = sample(**options, dtype=dtype)  # type: ignore[arg-type]
    check_against_reference(fuse, tensors, "fusion", backend)


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu_tanh", "silu", "quick_gelu"])
def test_activations(activation: str) -> None:
    check_float64(lambda t: fuse(t, activation=activation), sample(rank=2), activation)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    batch=st.integers(0, 3),
    width=st.integers(1, 7),
    out_len=st.integers(1, 7),
    out_dim=st.integers(1, 9),
    rank=st.integers(1, 3),
    bias=st.booleans(),
    residual=st.booleans(),
    layout=st.sampled_from(["contiguous", "tokens first", "strided"]),
)
def test_shapes_and_strides(lengths: list[int], batch: int, layout: str, **options: object) -> None:
    dims = [3 + 2 * i for i in range(len(lengths))]
    tensors = sample(lengths, dims, batch=batch, **options)  # type: ignore[arg-type]
    check_float64(fuse, laid_out(tensors, layout), "fusion")


def laid_out(tensors: Tensors, layout: str) -> Tensors:
    """The tensors with other strides."""
    for name, t in tensors.items():
        if layout == "tokens first" and t.dim() == 3:
            tensors[name] = t.transpose(0, 1).contiguous().transpose(0, 1)
        elif layout == "strided":
            tensors[name] = torch.stack([t, t], dim=-1)[..., 0]
    return tensors


@pytest.mark.skipif(FORMS == ["eager"], reason="needs the compiled library")
@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    dim=st.integers(1, 40),
    batch=st.integers(1, 5),
    width=st.integers(1, 30),
    out_len=st.integers(1, 20),
    rank=st.integers(1, 3),
    bias=st.booleans(),
    residual=st.sampled_from(["none", "given", "leading"]),
    fusion=st.sampled_from(["cp", "summed"]),
    counted=st.booleans(),
    layout=st.sampled_from(["contiguous", "tokens first", "strided"]),
    dtype=st.sampled_from(DTYPES[:3]),
    activation=st.sampled_from(["gelu", "silu", "identity"]),
)
def test_kernels_on_drawn_samples(
    lengths: list[int], dim: int, batch: int, out_len: int, residual: str, fusion: str,
    counted: bool, layout: str, activation: str, **options: object,
) -> None:  # fmt: skip
    tensors = sample(
        lengths, [dim] * len(lengths), out_dim=dim, batch=batch, out_len=out_len,
        residual=residual == "given", **options,  # type: ignore[arg-type]
    )  # fmt: skip
    extra: dict[str, object] = {"fusion": fusion, "activation": activation}
    if residual == "leading" and sum(lengths) >= out_len:
        extra["residual"] = "leading"
    if counted:
        gen = torch.Generator().manual_seed(0)
        extra["lengths"] = [torch.randint(-1, t + 2, (batch,), generator=gen) for t in lengths]
    check_against_reference(
        lambda t: fuse(t, **extra), laid_out(tensors, layout), "fusion", backend="cpu"
    )


@pytest.mark.parametrize("backend", FORMS[1:])
def test_sums_over_r_that_cancel(backend: str) -> None:
    """The definition forms these first: errors of the sums over tokens must not show behind."""
    tensors = sample((53,) * 3, (1,) * 3, width=15, out_len=15, out_dim=1, rank=2, residual=False)
    lengths = [torch.tensor(n) for n in ([3, 30, 20], [15, 42, 50], [26, 30, 24])]
    check_against_reference(
        lambda t: fuse(t, activation="identity", residual="leading", lengths=lengths),
        tensors, "fusion", backend,
    )  # fmt: skip


def test_factor_of_zeros() -> None:
    """A factor that is 0 has a gradient all the same: nothing divides by it."""
    tensors = sample(rank=2)
    for name in ("time_factor 1", "feature_factor 2"):
        tensors[name] = torch.zeros_like(tensors[name])
    check_float64(fuse, tensors, "zeros")
    tensors = sample()
    tensors["time_factor 1"] = torch.zeros_like(tensors["time_factor 1"])
    for backend in BACKENDS:
        results = run(fuse, tensors, backend)
        assert torch.equal(results["out 0"], tensors["residual"])
        assert results["d_time_factor 1"].any()
        assert not results["d_time_factor 0"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_cotangent(backend: str) -> None:
    tensors = sample(dtype=torch.float64)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    with fastadapters.backend(backend):
        y = fuse(leaves)
    expanded = torch.autograd.grad(y.sum(), list(leaves.values()), retain_graph=True)
    dense = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
    for a, b in zip(expanded, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [1, 2])
def test_gradcheck(rank: int, backend: str) -> None:
    tensors = sample(
        (3, 2, 2), (3, 2, 4), batch=2, width=2, out_len=2, out_dim=3, rank=rank, dtype=torch.float64
    )

    def fn(*values: Tensor) -> Tensor:
        with fastadapters.backend(backend):
            return fuse(dict(zip(tensors, values, strict=True)))

    leaves = tuple(t.clone().requires_grad_() for t in tensors.values())
    assert torch.autograd.gradcheck(fn, leaves)
    assert torch.autograd.gradgradcheck(fn, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_and_autocast(backend: str) -> None:
    """Parameters are cast to the inputs' or the autocast dtype, gradients come back in theirs.

    The residual, which has the dtype of the inputs, keeps its precision.
    """
    for features, autocast, expected in (
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.float16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.bfloat16, torch.float64),
    ):
        leaves = {
            name: (t.to(features) if name[:2] in ("x ", "re") else t).requires_grad_()
            for name, t in sample().items()
        }
        with (
            fastadapters.backend(backend),
            torch.autocast("cpu", autocast, enabled=autocast is not None),
        ):
            y = fuse(leaves)
        assert y.dtype == expected
        gradients = torch.autograd.grad(y.sum(), [*leaves.values()])
        for t, g in zip(leaves.values(), gradients, strict=True):
            assert g.dtype == t.dtype and torch.isfinite(g).all()


def test_compile() -> None:
    batches = (5, 8, 3, 16, 2)
    samples = [sample(batch=b, rank=2, dtype=torch.float64) for b in batches]
    check_compiled(fuse, samples, "aot_eager")


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_chosen_backend_that_cannot_run_raises(name: str) -> None:
    """No kernel takes float64 or nine modalities; `auto` runs eagerly."""
    nine = sample((2,) * 9, (4,) * 9, width=2, out_len=2, out_dim=4)
    for tensors in (sample(dtype=torch.float64), nine):
        with (
            fastadapters.backend(name),
            pytest.raises(RuntimeError, match=f"backend '{name}' cannot run sequence_fusion"),
        ):
            fuse(tensors)
        assert fastadapters.explain(fuse, tensors)[0].backend == "eager"


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


BAD = [
    ({"x 0": None}, TypeError, "inputs[0]: expected a floating-point tensor [B, T, D], got None"),
    ({"x 0": ones(2, 3, 4, dtype=torch.int32)}, TypeError, "got torch.int32"),
    ({"x 1": ones(2, 5)}, ValueError, "inputs[1]: expected [B, T, D], only B may be 0, got [2, 5]"),
    ({"x 1": ones(2, 0, 4)}, ValueError, "got [2, 0, 4]"),
    ({"x 1": ones(3, 5, 4)}, ValueError, "inputs[1]: expected [B, T, D] = [2, 5, 4], got [3, 5"),
    ({"down_weight 1": ones(2, 3)}, ValueError, "down_weights[1]: expected [r, D] = [2, 4], got"),
    ({"down_weight 0": ones(8)}, ValueError, "down_weights[0]: expected [r, D]"),
    ({"down_bias 0": ones(3)}, ValueError, "down_biases[0]: expected [r] = [2], got [3]"),
    ({"time_factor 0": ones(3, 6)}, ValueError, "time_factors[0]: expected [R, T, T_o]"),
    ({"time_factor 1": ones(1, 5, 7)}, ValueError, "time_factors[1]: expected [R, T, T_o] = [1, 5"),
    ({"time_factor 1": ones(2, 5, 6)}, ValueError, "[1, 5, 6], got [2, 5, 6]"),
    ({"feature_factor 0": ones(2, 8)}, ValueError, "feature_factors[0]: expected [R, r, D]"),
    ({"feature_factor 1": ones(1, 3, 8)}, ValueError, "feature_factors[1]: expected [R, r, D] = ["),
    ({"residual": ones(2, 6, 7)}, ValueError, "residual: expected [B, T_o, D] = [2, 6, 8], got"),
    ({"residual": ones(2, 6, 8).to("meta")}, ValueError, "residual: expected a tensor on"),
    ({"activation": "tanh"}, ValueError, "activation: expected one of identity, relu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    tensors = sample((3, 5), (4, 4), batch=2, width=2, out_len=6, out_dim=8)
    options = {name: value for name, value in change.items() if name not in tensors}
    changed = {name: change.get(name, t) for name, t in tensors.items()}
    with pytest.raises(error) as raised:
        fuse(changed, **options)  # type: ignore[arg-type]
    assert message in str(raised.value)


def test_bad_numbers_of_modalities() -> None:
    with pytest.raises(ValueError, match="inputs: expected at least one tensor, got none"):
        functional.sequence_fusion([], [], [], [], [])
    with pytest.raises(ValueError, match="down_biases: expected M = 1 tensors, got 0"):
        functional.sequence_fusion([ones(1, 2, 3)], [ones(2, 3)], [], [], [])

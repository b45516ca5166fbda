"""The GPU backends on a real GPU, with the samples of the simulated one; skipped without."""

from __future__ import annotations

from dataclasses import replace

import grouped_cases
import pytest
import sequence_fusion_cases as fusion
import torch
from against_reference import check_against_reference
from against_reference import run as run_op
from attention_cases import ADDITIVE, BIASES, SIZES, attention_tensors
from bottleneck_cases import DTYPES, Case, check_backend, inputs, option_cases, run, shape_cases
from torch import Tensor

import fastadapters
from fastadapters import backends, functional
from fastadapters.reference.cross_modal_attention import Bias

BACKENDS = [name for name in ("cuda", "triton") if backends.unavailable(name) is None]
DEVICE = "cuda"

pytestmark = [
    pytest.mark.skipif(not BACKENDS, reason="there is no GPU"),
    pytest.mark.parametrize("backend", BACKENDS or ["none"]),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*option_cases(), *shape_cases(activation="silu")], ids=str)
def test_matches_reference(case: Case, dtype: torch.dtype, backend: str) -> None:
    check_backend(replace(case, dtype=dtype), backend, device=DEVICE)


@pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(dtype: torch.dtype, param_dtype: torch.dtype, backend: str) -> None:
    case = Case(dtype=dtype, param_dtype=param_dtype, norm="both", scale="channel")
    check_backend(case, backend, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", option_cases(rows=(6, 17), activation="silu"), ids=str)
def test_grouped_matches_reference(case: Case, dtype: torch.dtype, backend: str) -> None:
    case = replace(case, dtype=dtype)
    for dims in (1, 2):
        index = grouped_cases.index_of(case, dims)
        grouped_cases.check_backend(case, index, backend, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_gives_equal_bits(dtype: torch.dtype, backend: str) -> None:
    case = Case(rows=(10_000,), d=768, r=64, dtype=dtype, norm="both", scale="channel", dropout=0.1)
    tensors = grouped_cases.inputs(case, 16, device=DEVICE)
    index = grouped_cases.index_of(case, adapters=16).to(DEVICE)
    first = grouped_cases.run(case, tensors, index, backend)
    for _ in range(100):
        for name, t in grouped_cases.run(case, tensors, index, backend).items():
            assert torch.equal(first[name], t), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_bits_from_run_to_run(dtype: torch.dtype, backend: str) -> None:
    """Ten thousand rows: a race that a simulation of a few blocks cannot have would show."""
    case = Case(rows=(10_000,), d=768, r=64, dtype=dtype, norm="both", scale="channel", dropout=0.1)
    tensors = inputs(case, device=DEVICE)
    first = run(case, tensors, backend)
    for _ in range(100):
        for name, t in run(case, tensors, backend).items():
            assert torch.equal(first[name], t), name


SMOOTH = {"activation": "silu"}  # what relu's kink decides no tolerance covers
FUSION = [
    *(
        replace(case, **SMOOTH if case.activation == "relu" and dtype != torch.float32 else {})
        for dtype in DTYPES
        for case in [*fusion.option_cases(dtype=dtype), *fusion.shape_cases(dtype=dtype)]
    ),
    *fusion.mixed_cases(torch.bfloat16),
    *fusion.mixed_cases(torch.float16),
]


@pytest.mark.parametrize("case", FUSION, ids=str)
def test_sequence_fusion_matches_reference(case: fusion.Case, backend: str) -> None:
    fusion.check_backend(case, backend, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sequence_fusion_gives_equal_bits(dtype: torch.dtype, backend: str) -> None:
    """UPMC-Food101's sizes, with lengths and all gradients."""
    case = fusion.Case((197, 512), (768, 768), (16, 16), 64, 16, 768, rank=4, dtype=dtype)
    case = replace(case, residual="leading", lengths=True)
    tensors = fusion.inputs(case, device=DEVICE)
    first = fusion.run(case, tensors, backend)
    for _ in range(100):
        for name, t in fusion.run(case, tensors, backend).items():
            assert torch.equal(first[name], t), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", BIASES, ids=str)
@pytest.mark.parametrize("per_item", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cross_modal_attention_matches_reference(
    sizes: tuple[int, ...], per_item: bool, bias: Bias, dtype: torch.dtype, backend: str
) -> None:
    tensors = {n: t.to(DEVICE) for n, t in attention_tensors(sizes, dtype, per_item).items()}
    check_against_reference(
        lambda t: functional.cross_modal_attention(**t, bias=bias), tensors, "attention", backend
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_modal_attention_gives_equal_bits(dtype: torch.dtype, backend: str) -> None:
    tensors = attention_tensors((1000, 1, 64, 8, 64), dtype)
    tensors = {name: t.to(DEVICE) for name, t in tensors.items()}

    def op(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return functional.cross_modal_attention(**t, bias=ADDITIVE)

    first = run_op(op, tensors, backend)
    for _ in range(100):
        for name, t in run_op(op, tensors, backend).items():
            assert torch.equal(first[name], t), name


def test_cuda_graph(backend: str) -> None:
    """Forward and backward are captured, and a replay computes on the new values."""
    gen = torch.Generator().manual_seed(0)
    shapes = ((300, 256), (32, 256), (256, 32))
    leaves = [torch.randn(*s, generator=gen).div(4).to(DEVICE).requires_grad_() for s in shapes]
    x, down, up = leaves

    def step() -> list[Tensor]:
        with fastadapters.backend(backend):
            y = functional.bottleneck(x, down, up, activation="gelu", residual=x)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn(300, 256, generator=gen))
    graph.replay()
    for replayed, computed in zip(captured, step(), strict=True):
        assert torch.equal(replayed, computed)


def test_more_elements_than_32_bits_count(backend: str) -> None:
    """The last rows of x beyond 2^31 elements are treated as they are alone."""
    d, r = 1024, 16
    rows, last = 2**31 // d + 1000, slice(-1000, None)
    if torch.cuda.mem_get_info()[0] < 6 * rows * d * 2:
        pytest.skip("needs 26 GB of GPU memory")
    x = torch.randn(rows, d, device=DEVICE, dtype=torch.bfloat16)
    down, up = (torch.randn(*shape, device=DEVICE) / 8 for shape in ((r, d), (d, r)))

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        with fastadapters.backend(backend):
            y = functional.bottleneck(leaf, down, up, residual=leaf)
        (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y[:1]).expand_as(y))
        return y.detach()[last].clone(), dx[last].clone()

    for whole, alone in zip(step(x), step(x[last]), strict=True):
        assert torch.equal(whole, alone)

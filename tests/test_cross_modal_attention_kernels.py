"""The CPU kernels of cross-modal attention, and the op around them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from against_reference import Tensors, check_against_reference, check_compiled, run
from attention_cases import (
    ADDITIVE,
    BIASES,
    INF,
    MASKED,
    NAMES,
    SIZES,
    attention_tensors,
    call,
    numbers,
    reference_pair,
)
from compare import check_all
from cpu_kernels import choose
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastadapters
from fastadapters import functional

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Bias = Sequence[Sequence[float]]


def attend(tensors: Tensors, **options: Any) -> Any:
    return functional.cross_modal_attention(**tensors, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", BIASES, ids=str)
@pytest.mark.parametrize("per_item", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kernels(sizes: tuple[int, ...], per_item: bool, bias: Bias, dtype: torch.dtype) -> None:
    tensors = attention_tensors(sizes, dtype, per_item)
    check_against_reference(lambda t: attend(t, bias=bias), tensors, "attention", "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_instruction_sets(kernels: Any, isa: str, dtype: torch.dtype) -> None:
    choose(isa)
    for sizes, bias in itertools.product([(37, 1, 5, 2, 32), (53, 3, 4, 1, 20)], BIASES[1:3]):
        tensors = attention_tensors(sizes, dtype)
        check_all(call(kernels, tensors, bias), reference_pair(tensors, bias), f"{sizes} {bias}")


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_sums_over_many_items_texts_and_images(kernels: Any, isa: str) -> None:
    """Where their length grew with the number of items or of an item's images, the texts' gradients
    were three times as far off as the definition's.
    """
    choose(isa)
    many = [
        (4, 1, 2**14, 1, 16), (4, 40, 2**10, 1, 16), (1200, 2, 3, 1, 16), (300, 2, 20, 2, 24),
        (4, 300, 8, 1, 16),
    ]  # fmt: skip
    for sizes, bias in itertools.product(many, BIASES[:2]):
        tensors = attention_tensors(sizes, torch.float32)
        check_all(call(kernels, tensors, bias), reference_pair(tensors, bias), f"{sizes} {bias}")


@settings(max_examples=40)
@given(
    sizes=st.tuples(
        st.integers(1, 60), st.integers(1, 4), st.sampled_from([0, 5, 12, 33]),
        st.integers(1, 3), st.integers(6, 40),
    ),
    per_item=st.booleans(),
    bias=st.lists(st.sampled_from([-INF, -2.0, 0.0, 1.5]), min_size=4, max_size=4),
    layout=st.sampled_from(["contiguous", "heads first", "strided"]),
    outputs=st.sampled_from(["both", "text", "image"]),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_shapes_and_strides(
    sizes: tuple[int, ...],
    per_item: bool,
    bias: list[float],
    layout: str,
    outputs: str,
    dtype: torch.dtype,
) -> None:
    tensors = attention_tensors(sizes, dtype, per_item)
    for name, t in tensors.items():
        if layout == "heads first":
            tensors[name] = t.transpose(-2, -3).contiguous().transpose(-2, -3)
        elif layout == "strided":
            tensors[name] = torch.stack([t, t], dim=-1)[..., 0]
    check_against_reference(
        lambda t: attend(t, bias=(bias[:2], bias[2:]), outputs=outputs), tensors, "drawn", "cpu"
    )


@pytest.mark.parametrize("outputs", ["both", "text", "image"])
@pytest.mark.parametrize("bias", [MASKED, ADDITIVE], ids=str)
def test_only_what_is_asked_for(bias: Bias, outputs: str) -> None:
    """Each output and each gradient alone has the bits it has among the others."""
    tensors = attention_tensors((50, 2, 3, 2, 16), torch.float32)
    kernels = torch.ops.fastadapters
    every = call(kernels, tensors, bias, outputs)
    for i, name in enumerate(NAMES):
        one = call(kernels, tensors, bias, outputs, 1 << i)
        assert [key for key in one if key.startswith("d_")] == [f"d_{name}"]
        for key, t in one.items():
            assert torch.equal(t, every[key]), key


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_equal_bits_from_run_to_run(threads: int) -> None:
    tensors = attention_tensors((300, 2, 20, 2, 24), torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, again = (call(torch.ops.fastadapters, tensors, ADDITIVE) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for key, t in first.items():
        assert torch.equal(t, again[key]), key
    check_all(first, reference_pair(tensors, ADDITIVE), f"{threads} threads")


@pytest.mark.parametrize(
    "values", [*itertools.product([-INF, -1e38, 0.0, 1e38], repeat=2)], ids=str
)
def test_no_bias_gives_nan(values: tuple[float, float]) -> None:
    """What is far greater decides alone."""
    tensors = attention_tensors((9, 2, 3, 2, 8), torch.float32)
    bias = (values, values)
    results = run(lambda t: attend(t, bias=bias), tensors, "cpu")
    assert all(torch.isfinite(t).all() for t in results.values())
    if values[0] != values[1]:
        clear = tuple(0.0 if v == max(values) else -INF for v in values)
        expected = run(lambda t: attend(t, bias=(clear, clear)), tensors, "cpu")
        torch.testing.assert_close(results, expected)
    if max(values) == -INF:
        assert not any(t.any() for t in results.values())


def test_operator() -> None:
    tensors = attention_tensors((11, 2, 3, 2, 8), torch.float32)
    options = (0.3, *numbers(ADDITIVE), 3)
    values = [t.requires_grad_() for t in tensors.values()]
    ops = torch.ops.fastadapters
    torch.library.opcheck(ops.cross_modal_attention_forward.default, (*values, *options, True))
    with torch.no_grad():
        *outs, state = ops.cross_modal_attention_forward(*values, *options, True)
    values = [t.detach() for t in values]
    torch.library.opcheck(
        ops.cross_modal_attention_backward.default, (*outs, *values, state, *options, 63)
    )


def test_compile() -> None:
    gen = torch.Generator().manual_seed(0)
    fixed = attention_tensors((9, 1, 2, 2, 8), torch.float32)
    samples = [
        fixed | {f"image_{kind}": torch.randn(b, 1, 2, 8, generator=gen) for kind in "qkv"}
        for b in (5, 8, 3, 16, 2)
    ]
    check_compiled(lambda t: attend(t, bias=ADDITIVE), samples)


def test_export_keeps_the_op() -> None:
    class Attend(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return functional.cross_modal_attention(*tensors, bias=ADDITIVE)

    tensors = tuple(attention_tensors((9, 1, 2, 2, 8), torch.float32).values())
    program = torch.export.export(Attend(), tensors)
    assert "fastadapters.cross_modal_attention_forward" in str(program.graph)
    torch.testing.assert_close(program.module()(*tensors), Attend()(*tensors))


def test_autocast() -> None:
    tensors = attention_tensors((9, 1, 2, 2, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results = run(lambda t: attend(t, bias=ADDITIVE), tensors, "cpu")
    expected = attend({name: t.bfloat16() for name, t in tensors.items()}, bias=ADDITIVE)
    for i in range(2):
        assert torch.equal(results[f"out {i}"], expected[i])
    assert all(results[f"d_{name}"].dtype == torch.float32 for name in tensors)


def test_checkpoint() -> None:
    tensors = attention_tensors((9, 2, 3, 2, 8), torch.float32)
    plain = run(lambda t: attend(t, bias=ADDITIVE), tensors, "cpu")

    def again(t: Tensors) -> Any:
        return checkpoint(lambda *v: functional.cross_modal_attention(*v, bias=ADDITIVE),
                          *t.values(), use_reentrant=False)  # fmt: skip

    for key, t in run(again, tensors, "cpu").items():
        assert torch.equal(t, plain[key]), key


def test_double_backward_is_refused() -> None:
    tensors = {
        name: t.requires_grad_()
        for name, t in attention_tensors((3, 1, 2, 1, 4), torch.float32).items()
    }
    (gradient,) = torch.autograd.grad(
        attend(tensors, bias=ADDITIVE)[0].sum(), [tensors["text_q"]], create_graph=True
    )
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


def test_saves_one_row_a_head_and_query() -> None:
    """Beside the inputs: no scores."""
    c, i, b, h, d = sizes = (40, 2, 6, 2, 8)
    tensors = attention_tensors(sizes, torch.float32)
    saved: list[Tensor] = []
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t) or t,  # type: ignore[func-returns-value]
        lambda t: t,
    ):
        attend(leaves, bias=ADDITIVE)
    inputs = {t.data_ptr() for t in leaves.values()}
    extra = sum(t.numel() for t in saved if t.data_ptr() not in inputs)
    assert extra == (c + 2 * b * i) * h * (d + 2)


def test_flops() -> None:
    """Two products a pair of query and key that see each other; text over text is counted once."""
    c, i, b, h, d = sizes = (40, 2, 6, 2, 8)
    tensors = attention_tensors(sizes, torch.float32)
    with fastadapters.backend("cpu"), FlopCounterMode(display=False) as counter:
        attend(tensors, bias=ADDITIVE)
    assert counter.get_total_flops() == 4 * h * d * (c * c + 2 * b * i * c + b * i * i)
    with fastadapters.backend("cpu"), FlopCounterMode(display=False) as counter:
        attend(tensors, bias=MASKED)
    assert counter.get_total_flops() == 4 * h * d * 2 * b * i * c

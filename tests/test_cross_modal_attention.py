"""Attention across modalities: definition, eager form, functional layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from against_reference import (
    Tensors,
    check_against_reference,
    check_float64,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastadapters
from fastadapters import functional

INF = math.inf
MASKED = ((-INF, 0.0), (0.0, -INF))
ADDITIVE = ((0.0, 1.0), (1.0, 0.0))
BIASES = (MASKED, ADDITIVE, ((0.3, -1.0), (-INF, 2.0)), ((0, -INF), (0, 0)))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("reference", "eager")


def attention_tensors(
    c: int, i: int, b: int, h: int, d: int, dtype: torch.dtype, per_item: bool = False
) -> Tensors:
    gen = torch.Generator().manual_seed(0)
    shapes = {"text": (*[b] * per_item, c, h, d), "image": (b, i, h, d)}
    return {
        f"{modality}_{kind}": torch.randn(shape, generator=gen).to(dtype)
        for modality, shape in shapes.items()
        for kind in "qkv"
    }


@pytest.mark.parametrize("bias", BIASES, ids=str)
def test_definition_is_masked_attention(bias: Sequence[Sequence[float]]) -> None:
    """Against PyTorch's own attention with the mask written out."""
    t = attention_tensors(5, 2, 3, 4, 8, torch.float64)
    q, k, v = (
        torch.cat([t[f"text_{n}"].expand(3, -1, -1, -1), t[f"image_{n}"]], 1).transpose(1, 2)
        for n in "qkv"
    )
    modality = [0] * 5 + [1] * 2
    mask = torch.tensor([[bias[m][n] for n in modality] for m in modality], dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3).transpose(1, 2)
    with fastadapters.backend("reference"):
        text, image = functional.cross_modal_attention(**t, bias=bias, scale=0.3)
    torch.testing.assert_close(torch.cat([text, image], 1), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", BIASES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "per_item"),
    [((37, 1, 5, 4, 32), False), ((37, 1, 5, 4, 32), True), ((7, 3, 4, 2, 16), False),
     ((7, 3, 4, 2, 16), True), ((1, 1, 2, 1, 8), False), ((100, 1, 8, 4, 32), False)],
)  # fmt: skip
def test_attention(
    sizes: tuple[int, ...],
    per_item: bool,
    bias: Sequence[Sequence[float]],
    dtype: torch.dtype,
) -> None:
    tensors = attention_tensors(*sizes, dtype, per_item)
    check_against_reference(
        lambda t: functional.cross_modal_attention(**t, bias=bias), tensors, "attention"
    )


@pytest.mark.parametrize("per_item", [False, True])
@pytest.mark.parametrize("n_images", [1, 3])
@pytest.mark.parametrize("n_texts", [1, 4])
def test_every_pattern_of_blocks(n_texts: int, n_images: int, per_item: bool) -> None:
    """-inf anywhere, a query that sees nothing included; each output alone equals its half."""
    tensors = attention_tensors(n_texts, n_images, 2, 2, 4, torch.float64, per_item)
    for values in itertools.product((-INF, 0.0, 0.7), repeat=4):
        bias = (values[:2], values[2:])
        check_float64(
            lambda t, bias=bias: functional.cross_modal_attention(**t, bias=bias),
            tensors,
            f"{bias}",
        )
        both = functional.cross_modal_attention(**tensors, bias=bias)
        for half, name in zip(both, ("text", "image"), strict=True):
            one = functional.cross_modal_attention(**tensors, bias=bias, outputs=name)
            assert torch.equal(one, half)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocked_query_gives_zero(backend: str) -> None:
    tensors = attention_tensors(4, 2, 3, 2, 8, torch.float32)
    bias = ((-INF, -INF), (0.0, 0.0))
    results = run(lambda t: functional.cross_modal_attention(**t, bias=bias), tensors, backend)
    assert not results["out 0"].any()
    assert not results["d_text_q"].any()
    assert results["d_text_k"].any()
    alone = run(
        lambda t: functional.cross_modal_attention(**t, bias=bias, outputs="text"), tensors, backend
    )
    assert all(not result.any() for result in alone.values())


@pytest.mark.parametrize("backend", (*BACKENDS, "auto"))
@pytest.mark.parametrize(
    ("bias", "outputs", "name"),
    [
        (MASKED, "text", "text_q"),  # the one image is what every text gets
        (MASKED, "text", "image_k"),
        (((-INF,) * 2,) * 2, "both", "text_v"),
        (((-INF,) * 2, (0, 0)), "text", "image_v"),
    ],
    ids=str,
)
def test_backward_where_nothing_can_matter(bias, outputs: str, name: str, backend: str) -> None:
    """An input that no result depends on gets a gradient of 0, though it be the only one."""
    tensors = attention_tensors(4, 1, 3, 2, 8, torch.float32)
    leaf = tensors[name].requires_grad_()
    with fastadapters.backend(backend):
        outs = functional.cross_modal_attention(**tensors, bias=bias, outputs=outputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        assert all(out.requires_grad for out in outs)
        (gradient,) = torch.autograd.grad(outs, leaf, [torch.ones_like(out) for out in outs])
    assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(50, 1, 3), (1, 1, 3), (1, 1, 1), (4, 2, 1), (4, 2, 3)])
@pytest.mark.parametrize("bias", [*BIASES, ((0, -INF), (0, -INF)), ((-INF,) * 2,) * 2], ids=str)
def test_results_may_be_written_to(sizes, bias, backend) -> None:
    """No element shares its memory with another, or with an input."""
    for per_item in (False, True):
        tensors = attention_tensors(*sizes, 2, 8, torch.float32, per_item)
        before = {name: t.clone() for name, t in tensors.items()}
        with fastadapters.backend(backend):
            outs = functional.cross_modal_attention(**tensors, bias=bias)
        for out in outs:
            expected = out / out.norm(dim=-1, keepdim=True)
            out /= out.norm(dim=-1, keepdim=True)
            assert torch.equal(out.nan_to_num(), expected.nan_to_num())
        for name, t in tensors.items():
            assert torch.equal(t, before[name]), name


@settings(max_examples=30)
@given(
    sizes=st.tuples(
        st.integers(1, 9),
        st.integers(1, 3),
        st.integers(0, 4),
        st.integers(1, 3),
        st.integers(1, 9),
    ),
    per_item=st.booleans(),
    bias=st.lists(st.sampled_from([-INF, -2.0, 0.0, 1.5]), min_size=4, max_size=4),
    scale=st.sampled_from([None, 0.0, 0.7, 4.0]),
    layout=st.sampled_from(["contiguous", "heads first", "strided"]),
)
def test_shapes_and_strides(
    sizes: tuple[int, ...], per_item: bool, bias: list[float], scale: float | None, layout: str
) -> None:
    tensors = attention_tensors(*sizes, torch.float64, per_item)
    for name, t in tensors.items():
        if layout == "heads first":
            tensors[name] = t.transpose(-2, -3).contiguous().transpose(-2, -3)
        elif layout == "strided":
            tensors[name] = torch.stack([t, t], dim=-1)[..., 0]
    check_float64(
        lambda t: functional.cross_modal_attention(**t, bias=(bias[:2], bias[2:]), scale=scale),
        tensors,
        "attention",
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [MASKED, ADDITIVE, ((-INF, -INF), (0.5, 0))], ids=str)
def test_gradcheck(bias: Sequence[Sequence[float]], backend: str) -> None:
    tensors = attention_tensors(3, 2, 2, 1, 2, torch.float64)

    def fn(*values: Tensor) -> tuple[Tensor, ...]:
        return functional.cross_modal_attention(
            **dict(zip(tensors, values, strict=True)), bias=bias
        )

    leaves = [t.clone().requires_grad_() for t in tensors.values()]
    with fastadapters.backend(backend):
        assert torch.autograd.gradcheck(fn, leaves)
        assert torch.autograd.gradgradcheck(fn, leaves)


def test_chosen_backend_without_kernel_raises() -> None:
    for name in ("triton", "cuda"):
        with (
            fastadapters.backend(name),
            pytest.raises(RuntimeError, match=f"backend '{name}' cannot run cross_modal_attention"),
        ):
            functional.cross_modal_attention(**attention_tensors(2, 1, 1, 1, 2, torch.float32))


BAD_ATTENTION = [
    ({"image_q": [1.0]}, TypeError, "image_q: expected a floating-point tensor [B, I, H, d]"),
    ({"image_q": torch.ones(2, 1, 2, 4, dtype=torch.int32)}, TypeError, "got torch.int32"),
    ({"image_q": torch.ones(2, 2, 4)}, ValueError, "image_q: expected [B, I, H, d]"),
    ({"image_q": torch.ones(2, 0, 2, 4)}, ValueError, "got [2, 0, 2, 4]"),
    (
        {"image_k": torch.ones(2, 2, 2, 4)},
        ValueError,
        "image_k: expected [B, I, H, d] = [2, 1, 2, 4], got [2, 2, 2, 4]",
    ),
    (
        {"text_q": None},
        TypeError,
        "text_q: expected a floating-point tensor [C, H, d], got NoneType",
    ),
    ({"text_q": torch.ones(2, 4)}, ValueError, "text_q: expected [C, H, d] or [B, C, H, d]"),
    ({"text_q": torch.ones(0, 2, 4)}, ValueError, "C >= 1, got [0, 2, 4]"),
    ({"text_q": torch.ones(3, 2, 5)}, ValueError, "text_q: expected [C, H, d] = [3, 2, 4]"),
    ({"text_q": torch.ones(1, 3, 2, 4)}, ValueError, "[B, C, H, d] = [2, 3, 2, 4]"),
    ({"text_v": torch.ones(4, 2, 4)}, ValueError, "text_v: expected [C, H, d] = [3, 2, 4]"),
    ({"text_k": torch.ones(3, 2, 4, device="meta")}, ValueError, "text_k: expected a tensor on"),
    ({"bias": ((0, 0),)}, ValueError, "bias: expected 2 x 2 numbers"),
    ({"bias": 0.0}, ValueError, "bias: expected 2 x 2 numbers"),
    ({"bias": ((0, INF), (0, 0))}, ValueError, "bias: expected finite numbers or -inf"),
    ({"bias": ((0, math.nan), (0, 0))}, ValueError, "bias: expected a number, got nan"),
    ({"outputs": "images"}, ValueError, "outputs: expected one of both, text, image"),
    ({"scale": "1"}, TypeError, "scale: expected a number or None, got str"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_ATTENTION)
def test_bad_attention(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        functional.cross_modal_attention(
            **{**attention_tensors(3, 1, 2, 2, 4, torch.float32), **change}
        )
    assert message in str(raised.value)

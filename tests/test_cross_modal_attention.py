"""Attention across modalities and the adapter head: definition, eager form, functional layer."""

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
    check_compiled,
    check_float64,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


def head_tensors(
    c: int, b: int, d: int, e: int, r: int, dtype: torch.dtype, down: int = 1, up: int = 2
) -> Tensors:
    """Features and the parameters of ``down`` and ``up`` layers."""
    gen = torch.Generator().manual_seed(0)
    widths = {
        "down": [d, *[r] * (down - 1), e],
        "in": [e, 3 * e],
        "out": [e, e],
        "up": [e, *[r] * (up - 1), d],
    }
    tensors = {"text": torch.randn(c, d, generator=gen), "image": torch.randn(b, d, generator=gen)}
    for name, sizes in widths.items():
        for k, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
            tensors[f"{name}{k}.weight"] = torch.randn(n_out, n_in, generator=gen) * n_in**-0.5
            tensors[f"{name}{k}.bias"] = torch.randn(n_out, generator=gen) * 0.2
    return {name: t.to(dtype) for name, t in tensors.items()}


def arguments(tensors: Tensors) -> tuple[object, ...]:
    """``head_tensors`` as the positional arguments of `functional.multimodal_logits`."""

    def layers(name: str) -> list[tuple[Tensor, Tensor]]:
        keys = [f"{name}{k}" for k in range(2) if f"{name}{k}.weight" in tensors]
        return [(tensors[f"{key}.weight"], tensors[f"{key}.bias"]) for key in keys]

    return (
        tensors["text"], tensors["image"],
        layers("down"), layers("in")[0], layers("out")[0], layers("up"),
    )  # fmt: skip


def logits(tensors: Tensors, **options: object) -> Tensor:
    return functional.multimodal_logits(
        *arguments(tensors), **{"num_heads": 4, "logit_scale": 50.0, **options}
    )


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapt", ["both", "image", "text"])
@pytest.mark.parametrize("bias", BIASES, ids=str)
@pytest.mark.parametrize(("down", "up"), [(1, 1), (2, 2)])
def test_logits(
    down: int, up: int, bias: Sequence[Sequence[float]], adapt: str, dtype: torch.dtype
) -> None:
    tensors = head_tensors(37, 6, 96, 32, 8, dtype, down, up)
    tensors["scale"] = torch.tensor(50.0, dtype=dtype)
    check_against_reference(
        lambda t: logits(
            t, bias=bias, adapt=adapt, logit_scale=t["scale"], down_activation="gelu", blend=0.3
        ),
        tensors,
        f"logits {adapt}",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", BIASES, ids=str)
@pytest.mark.parametrize(("down", "up", "per_item"), [(1, 1, False), (2, 2, False), (1, 2, True)])
def test_features(
    down: int, up: int, per_item: bool, bias: Sequence[Sequence[float]], dtype: torch.dtype
) -> None:
    tensors = head_tensors(11, 6, 64, 32, 16, dtype, down, up)
    if per_item:
        tensors["text"] = torch.stack([tensors["text"].roll(i, 0) for i in range(6)])
    check_against_reference(
        lambda t: functional.multimodal_features(*arguments(t), num_heads=4, bias=bias),
        tensors,
        "features",
    )


@pytest.mark.parametrize("bias", [MASKED, ADDITIVE], ids=str)
@pytest.mark.parametrize(("c", "b"), [(1, 1), (1, 3), (4, 1), (3, 0)])
def test_tiny_logits(c: int, b: int, bias: Sequence[Sequence[float]]) -> None:
    for adapt in ("both", "image", "text"):
        check_float64(
            lambda t, adapt=adapt: logits(t, bias=bias, adapt=adapt),
            head_tensors(c, b, 16, 8, 4, torch.float64),
            adapt,
        )


@pytest.mark.parametrize("adapt", ["both", "image", "text"])
@pytest.mark.parametrize("bias", [MASKED, ADDITIVE], ids=str)
def test_zero_upsampler(bias: Sequence[Sequence[float]], adapt: str) -> None:
    """An adapter that gives 0 leaves CLIP's cosine, in every backend."""
    tensors = head_tensors(7, 3, 32, 16, 8, torch.float32)
    for name in ("up1.weight", "up1.bias"):
        tensors[name] = torch.zeros_like(tensors[name])
    expected = 50 * F.normalize(tensors["image"], dim=1) @ F.normalize(tensors["text"], dim=1).T
    for backend in BACKENDS:
        with fastadapters.backend(backend):
            torch.testing.assert_close(logits(tensors, bias=bias, adapt=adapt), expected)


class LargestTensor(TorchDispatchMode):
    """The most elements that any operator's result has had."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.size = max(self.size, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("bias", [MASKED, ADDITIVE], ids=str)
def test_logits_hold_no_large_tensor(bias: Sequence[Sequence[float]]) -> None:
    """Forward and backward stay at [B, C, R] (or the parameters' sizes), R the hidden width."""
    c, b, d, r = 60, 20, 256, 8
    tensors = head_tensors(c, b, d, 32, r, torch.float32)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    with LargestTensor() as largest:
        out = logits(leaves, bias=bias)
        torch.autograd.grad(out.sum(), list(leaves.values()), allow_unused=True)
    assert largest.size <= max(b * c * max(r, 4), 4 * c * c, d * c)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [MASKED, ADDITIVE, ((-INF, -INF), (0.5, 0))], ids=str)
def test_gradcheck(bias: Sequence[Sequence[float]], backend: str) -> None:
    attention = attention_tensors(3, 2, 2, 1, 2, torch.float64)
    head = head_tensors(3, 2, 4, 4, 2, torch.float64)
    with fastadapters.backend(backend):
        for names, op in (
            (attention, lambda t: functional.cross_modal_attention(**t, bias=bias)),
            (head, lambda t: logits(t, bias=bias, num_heads=2, logit_scale=2.0)),
        ):
            leaves = [t.clone().requires_grad_() for t in names.values()]

            def fn(*values: Tensor, names=names, op=op):  # type: ignore[no-untyped-def]
                return op(dict(zip(names, values, strict=True)))

            assert torch.autograd.gradcheck(fn, leaves)
            assert torch.autograd.gradgradcheck(fn, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_and_autocast(backend: str) -> None:
    """Parameters are cast to the features' or the autocast dtype, gradients come back in theirs."""
    tensors = head_tensors(9, 4, 32, 16, 8, torch.float32)
    for features, autocast, expected in (
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.float16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.bfloat16, torch.float64),
    ):
        leaves = {
            name: t.to(features if name in ("text", "image") else t.dtype, copy=True)
            for name, t in tensors.items()
        }
        for t in leaves.values():
            t.requires_grad_()
        with (
            fastadapters.backend(backend),
            torch.autocast("cpu", autocast, enabled=autocast is not None),
        ):
            out = logits(leaves, bias=ADDITIVE)
            text, image = functional.multimodal_features(*arguments(leaves), num_heads=4)
        assert out.dtype == text.dtype == image.dtype == expected
        (out.sum() + text.sum() + image.sum()).backward()
        assert all(t.grad is not None and t.grad.dtype == t.dtype for t in leaves.values())


@pytest.mark.parametrize("bias", [MASKED, ADDITIVE], ids=str)
def test_compile(bias: Sequence[Sequence[float]]) -> None:
    def step(tensors: Tensors) -> Tensor:
        text, image = functional.multimodal_features(*arguments(tensors), num_heads=4, bias=bias)
        return logits(tensors, bias=bias).square().mean() + text.mean() + image.square().mean()

    tensors = head_tensors(9, 2, 32, 16, 8, torch.float64)
    gen = torch.Generator().manual_seed(1)
    images = (torch.randn(b, 32, generator=gen, dtype=torch.float64) for b in (5, 8, 3, 16, 2))
    check_compiled(step, [tensors | {"image": image} for image in images])


def test_chosen_backend_without_kernel_raises() -> None:
    for name in ("cpu", "triton", "cuda"):
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
    ({"text_q": None}, TypeError, "text_q: expected a tensor [C, H, d], got NoneType"),
    ({"text_q": torch.ones(2, 4)}, ValueError, "text_q: expected [C, H, d] or [B, C, H, d]"),
    ({"text_q": torch.ones(0, 2, 4)}, ValueError, "C >= 1, got [0, 2, 4]"),
    ({"text_q": torch.ones(3, 2, 5)}, ValueError, "text_q: expected [C, H, d] = [3, 2, 4]"),
    ({"text_q": torch.ones(1, 3, 2, 4)}, ValueError, "[B, C, H, d] = [2, 3, 2, 4]"),
    ({"text_v": torch.ones(4, 2, 4)}, ValueError, "text_v: expected [C, H, d] = [3, 2, 4]"),
    ({"text_k": torch.ones(3, 2, 4, device="meta")}, ValueError, "text_k: expected a tensor on"),
    ({"bias": ((0, 0),)}, ValueError, "bias: expected 2 x 2 numbers"),
    ({"bias": 0.0}, ValueError, "bias: expected 2 x 2 numbers"),
    ({"bias": ((0, INF), (0, 0))}, ValueError, "bias: expected finite numbers or -inf"),
    ({"bias": ((0, math.nan), (0, 0))}, ValueError, "bias: expected finite numbers or -inf"),
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


BAD_HEAD = [
    ({"image": torch.ones(2, 1, 8)}, "image: expected [B, D]"),
    ({"text": torch.ones(3, 7)}, "text: expected [C, D] = [3, 8], got [3, 7]"),
    ({"text": torch.ones(0, 8)}, "text: expected [C, D] with C >= 1"),
    ({"text": torch.ones(2, 3, 8)}, "text: expected [C, D], got [2, 3, 8]"),
    ({"down0.weight": torch.ones(4, 9)}, "down weight: expected [E, D] = [4, 8], got [4, 9]"),
    ({"down0.bias": torch.ones(3)}, "down bias: expected [E] = [4], got [3]"),
    ({"in0.weight": torch.ones(4, 4)}, "in_proj weight: expected [3 E, E] = [12, 4]"),
    ({"out0.weight": torch.ones(4)}, "out_proj weight: expected [E, E]"),
    ({"up0.bias": torch.ones(3)}, "up[0] bias: expected [R] = [2], got [3]"),
    ({"up1.weight": torch.ones(8, 3)}, "up[1] weight: expected [D, R] = [8, 2], got [8, 3]"),
    ({"num_heads": 3}, "num_heads: expected a divisor of E = 4, got 3"),
    ({"adapt": "none"}, "adapt: expected one of both, text, image, got 'none'"),
    ({"bias": ((0, 0, 0), (0, 0, 0))}, "bias: expected 2 x 2 numbers"),
    ({"down_activation": "tanh"}, "down_activation: expected one of"),
    ({"logit_scale": torch.ones(2)}, "logit_scale: expected one element, got [2]"),
]


@pytest.mark.parametrize(("change", "message"), BAD_HEAD)
def test_bad_head(change: dict[str, object], message: str) -> None:
    tensors = head_tensors(3, 2, 8, 4, 2, torch.float32)
    options: dict[str, object] = {"num_heads": 2, "logit_scale": 1.0}
    for name, value in change.items():
        (tensors if name in tensors else options)[name] = value  # type: ignore[index]
    with pytest.raises(ValueError) as raised:
        functional.multimodal_logits(*arguments(tensors), **options)  # type: ignore[arg-type]
    assert message in str(raised.value)


def test_bad_number_of_layers() -> None:
    text, image, down, in_proj, out_proj, up = arguments(head_tensors(3, 2, 8, 4, 2, torch.float32))
    with pytest.raises(ValueError, match="down: expected one or two layers, got 0"):
        functional.multimodal_features(text, image, [], in_proj, out_proj, up, num_heads=2)
    with pytest.raises(TypeError, match="logit_scale: expected a number or a tensor, got str"):
        functional.multimodal_logits(
            text, image, down, in_proj, out_proj, up, num_heads=2, logit_scale="100"
        )

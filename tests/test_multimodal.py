"""The multi-modal adapter's head: every backend that can run here, against the reference."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from against_reference import Tensors, check_against_reference, check_float64, run
from compare import check_all, last_bit
from hypothesis import given, settings
from hypothesis import strategies as st
from multimodal_cases import (
    ADAPT,
    ADDITIVE,
    BIASES,
    INF,
    MASKED,
    arguments,
    head_tensors,
    logits,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastadapters
from fastadapters import backends, functional

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ["eager"] + [name for name in ("cpu",) if backends.unavailable(name) is None]
EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


@EACH_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapt", ADAPT)
@pytest.mark.parametrize("bias", BIASES, ids=str)
@pytest.mark.parametrize(("down", "up"), [(1, 1), (2, 2)])
def test_logits(
    down: int,
    up: int,
    bias: Sequence[Sequence[float]],
    adapt: str,
    dtype: torch.dtype,
    backend: str,
) -> None:
    if dtype == torch.float64 and backend != "eager":
        pytest.skip("the kernels take no float64")
    if backend == "eager" and dtype == torch.float32 and max(map(max, bias)) == -INF:
        pytest.skip("every pair has the same vector, and its terms cancel: float64 tells")
    tensors = head_tensors(37, 6, 96, 32, 8, dtype, down, up)
    tensors["scale"] = torch.tensor(50.0, dtype=dtype)
    tensors["blend"] = torch.tensor(0.3, dtype=dtype)
    check_against_reference(
        lambda t: logits(
            t, bias=bias, adapt=adapt, logit_scale=t["scale"], blend=t["blend"],
            down_activation="gelu",
        ),
        tensors,
        f"logits {adapt}",
        backend,
    )  # fmt: skip


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


@EACH_BACKEND
@pytest.mark.parametrize("bias", [MASKED, ADDITIVE], ids=str)
@pytest.mark.parametrize(("c", "b"), [(1, 1), (1, 3), (4, 1), (3, 0)])
def test_tiny_logits(c: int, b: int, bias: Sequence[Sequence[float]], backend: str) -> None:
    for adapt in ADAPT:
        tensors = head_tensors(c, b, 16, 8, 4, torch.float64)
        if backend == "eager":
            check_float64(lambda t, adapt=adapt: logits(t, bias=bias, adapt=adapt), tensors, adapt)
            continue
        single = {name: t.float() for name, t in tensors.items()}
        check_against_reference(
            lambda t, adapt=adapt: logits(t, bias=bias, adapt=adapt), single, adapt, backend
        )


@EACH_BACKEND
@pytest.mark.parametrize("adapt", ADAPT)
@pytest.mark.parametrize("bias", [MASKED, ADDITIVE], ids=str)
def test_zero_upsampler(bias: Sequence[Sequence[float]], adapt: str, backend: str) -> None:
    """An adapter that gives 0 leaves CLIP's cosine."""
    tensors = head_tensors(7, 3, 32, 16, 8, torch.float32)
    for name in ("up1.weight", "up1.bias"):
        tensors[name] = torch.zeros_like(tensors[name])
    expected = 50 * F.normalize(tensors["image"], dim=1) @ F.normalize(tensors["text"], dim=1).T
    with fastadapters.backend(backend):
        torch.testing.assert_close(logits(tensors, bias=bias, adapt=adapt), expected)


@EACH_BACKEND
def test_blend_is_rounded_once(backend: str) -> None:
    """Of 0.9999 in fp32, 1 - blend is off by 1.7e-4 of it, and the image's gradient with it."""
    check_against_reference(
        lambda t: logits(t, bias=((-INF,) * 2,) * 2, adapt="image", blend=0.9999),
        head_tensors(12, 5, 32, 16, 8, torch.float32), "blend", backend,
    )  # fmt: skip


@EACH_BACKEND
@pytest.mark.parametrize("bias", [MASKED, ADDITIVE, ((0.0, -INF), (0.0, 0.0))], ids=str)
def test_what_the_adapter_gives_nearly_cancels(
    bias: Sequence[Sequence[float]], backend: str
) -> None:
    """|u| = |W e + b| is a thousandth of |b|: the square of that must not be lost in rounding."""
    tensors = head_tensors(50, 20, 256, 32, 16, torch.float32)
    tensors["up0.weight"] *= 2e-4
    e = F.gelu(tensors["up0.bias"])
    gen = torch.Generator().manual_seed(1)
    away = 1e-3 * torch.randn(256, generator=gen)
    tensors["up1.bias"] = (-(tensors["up1.weight"].double() @ e.double()) * (1 + away)).float()
    with fastadapters.backend("reference"):
        u, _ = functional.multimodal_features(*arguments(tensors), num_heads=4, bias=bias)
    assert 2e-4 < u.norm(dim=-1).mean() / tensors["up1.bias"].norm() < 3e-3

    def run(tensors: Tensors, name: str) -> Tensors:
        with fastadapters.backend(name):
            return {"logits": logits(tensors, bias=bias)}

    def pair(draw: int) -> tuple[Tensors, Tensors]:
        moved = {key: last_bit(t, draw, torch.float32) for key, t in tensors.items()}
        gold = run({key: t.double() for key, t in moved.items()}, "reference")
        return gold, run(moved, "reference")

    check_all(run(tensors, backend), pair, backend)


@EACH_BACKEND
@pytest.mark.parametrize("adapt", ADAPT)
@pytest.mark.parametrize("bias", [MASKED, ADDITIVE, ((0.0, -INF), (0.0, 0.0))], ids=str)
@pytest.mark.parametrize("length", [0.0, 1e-16])
def test_features_without_length(
    length: float, bias: Sequence[Sequence[float]], adapt: str, backend: str
) -> None:
    """A text or an image below the floor of a length counts as what the floor makes of it."""
    tensors = head_tensors(30, 20, 64, 16, 8, torch.float32)
    tensors["text"][2] *= length
    tensors["image"][3] *= length
    features = {name: tensors.pop(name) for name in ("text", "image")}
    check_against_reference(
        lambda t: logits(features_like(features, t) | t, bias=bias, adapt=adapt),
        tensors, f"{length}", backend,
    )  # fmt: skip


def features_like(features: Tensors, tensors: Tensors) -> Tensors:
    return {name: t.to(tensors["in0.weight"].dtype) for name, t in features.items()}


sizes = st.tuples(
    st.integers(1, 60), st.integers(0, 40), st.integers(48, 100), st.integers(1, 4),
    st.integers(1, 12), st.integers(1, 24),
)  # fmt: skip


@EACH_BACKEND
@settings(max_examples=15)
@given(
    sizes=sizes,
    bias=st.lists(st.sampled_from([-INF, -2.0, 0.0, 1.5]), min_size=4, max_size=4),
    adapt=st.sampled_from(ADAPT),
    layers=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    activation=st.sampled_from(["identity", "relu", "gelu", "silu"]),
    blend=st.sampled_from([0.0, 0.2, 0.9, 1.5]),
    strided=st.booleans(),
)
def test_sizes_and_options(
    backend: str,
    sizes: tuple[int, ...],
    bias: list[float],
    adapt: str,
    layers: tuple[int, int],
    activation: str,
    blend: float,
    strided: bool,
) -> None:
    c, b, d, heads, head_size, r = sizes

    def drawn(seed: int) -> Tensors:
        tensors = head_tensors(c, b, d, heads * head_size, r, torch.float32, *layers, seed=seed)
        if strided:
            for name in ("text", "image"):
                tensors[name] = torch.cat([tensors[name], tensors[name]], dim=1)[:, :d]
        return tensors

    tensors = drawn(0)
    options = {
        "bias": (bias[:2], bias[2:]), "adapt": adapt, "down_activation": activation,
        "blend": blend, "num_heads": heads,
    }  # fmt: skip

    def head(t: Tensors) -> Tensor:
        return logits(t, **options)

    def pair(draw: int) -> tuple[Tensors, Tensors]:
        """The base is `eager`, which has the kernels' algebra, with more roundings.

        Where scores are large one rounding of a query decides, and it is the same in most of the
        samples that are moved in their last bit: these are drawn anew.
        """
        sample = drawn(draw)
        gold = run(head, {name: t.double() for name, t in sample.items()}, "reference")
        return gold, run(head, sample, "eager")

    if backend == "eager":
        check_float64(head, tensors, f"{sizes}", backend)
    else:
        check_all(run(head, tensors, backend), pair, f"{sizes}")


@EACH_BACKEND
@pytest.mark.parametrize("bias", [MASKED, ADDITIVE], ids=str)
def test_gradients_asked_for(bias: Sequence[Sequence[float]], backend: str) -> None:
    """Each alone is what it is among all."""
    tensors = head_tensors(20, 9, 32, 16, 8, torch.float32, down=2)
    tensors |= {"scale": torch.tensor(50.0), "blend": torch.tensor(0.3)}

    def gradients(wanted: list[str]) -> list[Tensor]:
        leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in tensors.items()}
        with fastadapters.backend(backend):
            out = logits(leaves, bias=bias, logit_scale=leaves["scale"], blend=leaves["blend"])
        out.square().sum().backward()
        return [leaves[name].grad for name in wanted]

    together = gradients([*tensors])
    for name, expected in zip(tensors, together, strict=True):
        torch.testing.assert_close(
            gradients([name])[0], expected, msg=lambda m, n=name: f"{n}: {m}"
        )


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


@EACH_BACKEND
@pytest.mark.parametrize("bias", [MASKED, ADDITIVE], ids=str)
def test_logits_hold_no_large_tensor(bias: Sequence[Sequence[float]], backend: str) -> None:
    """Eagerly forward and backward stay at [B, C, R] (or the parameters' sizes), R the hidden
    width; the kernels keep rows of texts and of images, and one number for each pair."""
    c, b, d, e, r = 60, 20, 256, 32, 8
    leaves = {n: t.requires_grad_() for n, t in head_tensors(c, b, d, e, r, torch.float32).items()}
    with LargestTensor() as largest, fastadapters.backend(backend):
        out = logits(leaves, bias=bias)
        torch.autograd.grad(out.sum(), list(leaves.values()), allow_unused=True)
    most = max(b * c * max(r, 4), 4 * c * c, d * c)
    if backend != "eager":
        most = (c + b) * (6 * e + r) + 2 * b * d + b * c
    assert largest.size <= most


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("bias", [MASKED, ADDITIVE, ((-INF, -INF), (0.5, 0))], ids=str)
def test_gradcheck(bias: Sequence[Sequence[float]], backend: str) -> None:
    tensors = head_tensors(3, 2, 4, 4, 2, torch.float64)

    def fn(*values: Tensor) -> Tensor:
        named = dict(zip(tensors, values, strict=True))
        return logits(named, bias=bias, num_heads=2, logit_scale=2.0)

    leaves = [t.clone().requires_grad_() for t in tensors.values()]
    with fastadapters.backend(backend):
        assert torch.autograd.gradcheck(fn, leaves)
        assert torch.autograd.gradgradcheck(fn, leaves)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_mixed_dtypes_and_autocast(backend: str) -> None:
    """Parameters are cast to the features' or the autocast dtype, or used as they are; gradients
    come back in theirs."""
    tensors = head_tensors(9, 4, 32, 16, 8, torch.float32)
    for features, autocast, expected in (
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.float16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.bfloat16, torch.float64),
    ):
        if features == torch.float64 and backend == "cpu":
            continue
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
        assert out.dtype == expected
        out.sum().backward()
        assert all(t.grad is not None and t.grad.dtype == t.dtype for t in leaves.values())


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
    text, image, layers = arguments(head_tensors(3, 2, 8, 4, 2, torch.float32))
    with pytest.raises(ValueError, match=r"layers\.down: expected one or two layers, got 0"):
        functional.multimodal_features(text, image, layers._replace(down=[]), num_heads=2)
    with pytest.raises(TypeError, match="logit_scale: expected a number or a tensor, got str"):
        functional.multimodal_logits(text, image, layers, num_heads=2, logit_scale="100")

"""`functional.multiway_bottleneck` against two separate bottlenecks of the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bottleneck_cases import DTYPES
from compare import check_all, last_bit, named
from torch import Tensor

import fastadapters
from fastadapters import backends, eager
from fastadapters.functional import BottleneckParameters, bottleneck, multiway_bottleneck
from fastadapters.reference.philox import dropout_multiplier

BACKENDS = ["eager"] + [name for name in ("cpu",) if backends.unavailable(name) is None]
B, T, D = 3, 41, 72


def sample(dtype: torch.dtype, widths: tuple[int, ...]) -> Iterator[Tensor]:
    gen = torch.Generator().manual_seed(11)
    yield torch.randn(B, T, D, generator=gen).to(dtype)
    yield torch.randn(B, T, D, generator=gen).to(dtype)
    for r in widths:
        for shape, gain in (
            ((r, D), D**-0.5), ((D, r), r**-0.5), ((r,), 0.5), ((D,), 0.5), ((1,), 1.0),
            ((D,), 1.0), ((D,), 0.3),
        ):  # fmt: skip
            yield (torch.randn(*shape, generator=gen) * gain).to(dtype)


def run(tensors: list[Tensor], split: int, residual: str, dropout: float, name: str, op: bool):
    leaves = [t.detach().requires_grad_() for t in tensors]
    x, other = leaves[:2]
    sides = [BottleneckParameters(*leaves[2 + 7 * i : 9 + 7 * i]) for i in (0, 1)]
    options = {"activation": "gelu", "dropout": dropout, "training": True}
    torch.manual_seed(5)
    with fastadapters.backend(name):
        if op:
            res = {"x": x, "other": other, "none": None}[residual]
            y = multiway_bottleneck(x, split, *sides, residual=res, **options)
        else:
            halves = []
            for part, side in zip((slice(0, split), slice(split, T)), sides, strict=True):
                xs = x[:, part]
                res = {"x": xs, "other": other[:, part], "none": None}[residual]
                halves.append(bottleneck(xs, **side._asdict(), residual=res, **options))
            y = torch.cat(halves, dim=1)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
        grads = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None)]


def reference_pair(tensors: list[Tensor], *arguments: Any) -> Any:
    """(gold, base) of a draw for `compare.check_all`: two bottlenecks of the reference."""

    def pair(draw: int) -> list[dict[str, Tensor]]:
        moved = [last_bit(t, draw, tensors[0].dtype) for t in tensors]
        return [
            named(run(ts, *arguments, "reference", op=False))
            for ts in ([t.double() for t in moved], moved)
        ]

    return pair


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", [1, 17, 40])
@pytest.mark.parametrize(("residual", "dropout"), [("x", 0.0), ("other", 0.2), ("none", 0.2)])
def test_is_two_bottlenecks(name, dtype, split, residual, dropout) -> None:
    tensors = list(sample(dtype, (16, 24)))
    out = run(tensors, split, residual, dropout, name, op=True)
    check_all(named(out), reference_pair(tensors, split, residual, dropout))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float64_parameters(name: str, dtype: torch.dtype) -> None:
    """They are rounded to the dtype of x on the way in."""
    tensors = [t.double() if i > 1 else t for i, t in enumerate(sample(dtype, (16, 24)))]
    out = run(tensors, 17, "x", 0.0, name, op=True)
    rounded = run([t.to(dtype) for t in tensors], 17, "x", 0.0, name, op=True)
    assert out[0].dtype == dtype and {g.dtype for g in out[2:]} == {torch.float64}
    assert all(torch.equal(a.to(dtype), b) for a, b in zip(out, rounded, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("split", "side"), [(-1, 0), (T, 0), (0, 1)])
def test_one_modality_alone(name: str, split: int, side: int) -> None:
    x, _, *rest = sample(torch.float32, (16, 24))
    sides = [BottleneckParameters(*rest[7 * i : 7 * i + 7]) for i in (0, 1)]
    with fastadapters.backend(name):
        y = multiway_bottleneck(x, split, *sides)
        assert torch.equal(y, bottleneck(x, **sides[side]._asdict()))


MANY = {
    "three": ((5, 20), (8, 8, 8), {}),
    "widths": ((1, 20, 40), (8, 3, 16, 5), {}),
    "one without tokens": ((7, 7, 20), (8, 8, 8, 4), {}),
    "all in two": ((0, 20), (8, 8, 8), {}),
    "dropout": ((5, 20), (8, 8, 8), {"dropout": 0.5}),
    "one without a bias": ((5, 20), (8, 8, 8), {"without": ("down_bias", "up_bias")}),
    "one without a norm": ((5, 20), (8, 8, 8), {"without": ("norm_weight", "norm_bias")}),
    "scales": ((5, 20), (8, 8, 8), {"scales": (0.5, 2.0, "channel")}),
}


def run_many(tensors: list[Tensor], kind: str, residual: str, name: str, op: bool) -> list[Tensor]:
    splits, widths, changes = MANY[kind]
    leaves = [t.detach().requires_grad_() for t in tensors]
    x, other = leaves[:2]
    sides = [BottleneckParameters(*leaves[2 + 7 * i : 9 + 7 * i]) for i in range(len(widths))]
    sides[1] = sides[1]._replace(**dict.fromkeys(changes.get("without", ())))
    for i, scale in enumerate(changes.get("scales", ())):
        sides[i] = sides[i]._replace(scale=sides[i].up_bias if scale == "channel" else scale)
    dropout = changes.get("dropout", 0.0)
    torch.manual_seed(5)
    with fastadapters.backend(name):
        if op:
            res = {"x": x, "other": other, "none": None}[residual]
            first, second, *others = sides
            y = multiway_bottleneck(
                x, splits, first, second, others=others, residual=res, activation="gelu",
                dropout=dropout, training=True,
            )  # fmt: skip
        else:
            seeds = torch.randint(2**62, (2,)) if dropout else None
            mask = None if seeds is None else dropout_multiplier(seeds, B * T, 8, dropout, x.dtype)
            parts = []
            for side, begin, end in zip(sides, (0, *splits), (*splits, T), strict=True):
                part = x[:, begin:end]
                if mask is None:
                    branch = bottleneck(part, **side._asdict(), activation="gelu")
                else:
                    own = mask.reshape(B, T, 8)[:, begin:end].reshape(-1, 8)
                    branch = eager.bottleneck(
                        part, **side._asdict(), activation="gelu", masks=(None, own)
                    )
                parts.append(branch)
            y = torch.cat(parts, dim=1)
            y = {"x": y + x, "other": y + other, "none": y}[residual]
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
        grads = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    zeroed = zip(grads, leaves, strict=True)
    return [y.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zeroed)]


def check_many(kind: str, residual: str, name: str) -> None:
    tensors = list(sample(torch.float32, MANY[kind][1]))
    out = run_many(tensors, kind, residual, name, op=True)

    def pair(draw: int) -> list[dict[str, Tensor]]:
        moved = [last_bit(t, draw, torch.float32) for t in tensors]
        doubles = [t.double() for t in moved]
        return [
            named(run_many(ts, kind, residual, "reference", op=False)) for ts in (doubles, moved)
        ]

    check_all(named(out), pair)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("residual", ["x", "none"])
@pytest.mark.parametrize("kind", MANY)
def test_any_number_of_modalities(kind: str, residual: str, name: str) -> None:
    check_many(kind, residual, name)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the compiled library")
def test_three_modalities_are_one_op() -> None:
    x, _, *rest = sample(torch.float32, (8, 8, 5))
    first, second, third = (BottleneckParameters(*rest[7 * i : 7 * i + 7]) for i in range(3))
    with torch.profiler.profile() as profile:
        multiway_bottleneck(x, (5, 20), first, second, others=[third])
    ops = [event.name for event in profile.events() if event.name.startswith("fastadapters::")]
    assert ops == ["fastadapters::grouped_forward"]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ((5,), r"split: expected 2 integers, got 1"),
        (5, r"split: expected 2 integers, got 1"),
        ((20, 5), rf"split: expected 0 <= ... <= T = {T}, in order, got \[20, 5\]"),
        ((-1, 5), rf"split: expected 0 <= ... <= T = {T}, in order, got \[-1, 5\]"),
        ((5, T + 1), rf"split: expected 0 <= ... <= T = {T}, in order, got \[5, {T + 1}\]"),
        ((5, 6.5), "split: expected an integer, got float"),
    ],
)
def test_bad_splits(splits: Any, message: str) -> None:
    x, _, *rest = sample(torch.float32, (8, 8, 8))
    first, second, third = (BottleneckParameters(*rest[7 * i : 7 * i + 7]) for i in range(3))
    with pytest.raises((ValueError, TypeError), match=message):
        multiway_bottleneck(x, splits, first, second, others=[third])


@pytest.mark.parametrize("split", [-2, T + 1])
def test_bad_split(split: int) -> None:
    x, _, *rest = sample(torch.float32, (16, 24))
    sides = [BottleneckParameters(*rest[7 * i : 7 * i + 7]) for i in (0, 1)]
    with pytest.raises(ValueError, match=rf"split: expected -1 <= split <= T = {T}, got {split}"):
        multiway_bottleneck(x, split, *sides)
    with pytest.raises(ValueError, match=r"x: expected a tensor \[\.\.\., T, D\], got \[72\]"):
        multiway_bottleneck(x[0, 0], 0, *sides)
    with pytest.raises(TypeError, match="x: expected a floating-point tensor"):
        multiway_bottleneck(None, 0, *sides)  # type: ignore[arg-type]


def three_modalities() -> tuple[Tensor, list[BottleneckParameters]]:
    gen = torch.Generator().manual_seed(0)
    x, *weights = (
        torch.randn(*shape, generator=gen) for shape in ((2, 9, 8), *[(5, 8), (8, 5)] * 3)
    )
    scales = (1.0, torch.full((1,), 0.5), 2.0)
    pairs = zip(weights[::2], weights[1::2], scales, strict=True)
    return x, [BottleneckParameters(down, up, scale=scale) for down, up, scale in pairs]


@pytest.mark.parametrize("name", BACKENDS)
def test_the_same_mask_for_three_modalities(name: str) -> None:
    x, (first, second, third) = three_modalities()
    ys = []
    for backend in ("reference", name):
        torch.manual_seed(0)
        with fastadapters.backend(backend):
            y = multiway_bottleneck(
                x, (2, 5), first, second, others=[third], dropout=0.5, training=True
            )
        ys.append(y)
    torch.testing.assert_close(*ys)


@pytest.mark.parametrize("name", BACKENDS)
def test_three_modalities_on_another_device_than_the_default(name: str) -> None:
    x, (first, second, third) = three_modalities()
    ys = []
    for default in ("cpu", "meta"):
        with fastadapters.backend(name), torch.device(default):
            ys.append(multiway_bottleneck(x, (2, 5), first, second, others=[third]))
    assert torch.equal(*ys)

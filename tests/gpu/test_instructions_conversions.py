"""Conversions, moves and constants against numpy, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from instructions import NUMPY, N, each, execute, narrow, same, samples, widen

INTEGERS = ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"]


@pytest.mark.parametrize("source", INTEGERS)
def test_integer_conversions(source: str) -> None:
    a = samples(source, 1)
    for to in INTEGERS:
        if to in ("s8", "u8"):  # held sign- or zero-extended in 16 bits
            wide = to[0] + "16"
            got = execute(f"cvt.{to}.{source} {{d}}, {{a}};", wide, {"a": (source, a)})
            same(wide, got, a.astype(NUMPY[to]).astype(NUMPY[wide]))
            continue
        same(
            to,
            execute(f"cvt.{to}.{source} {{d}}, {{a}};", to, {"a": (source, a)}),
            a.astype(NUMPY[to]),
        )
        got = execute(f"cvt.sat.{to}.{source} {{d}}, {{a}};", to, {"a": (source, a)})
        limits = np.iinfo(NUMPY[to])
        same(
            to,
            got,
            each(lambda v, limits=limits: min(max(v, int(limits.min)), int(limits.max)), to, a),
        )


@pytest.mark.parametrize("source", ["f16", "bf16", "f32", "f64"])
def test_float_to_integer(source: str) -> None:
    a = samples(source, 1)
    x = widen(source, a).astype(np.float64)
    functions = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    for to in ("s16", "u16", "s32", "u32", "s64", "u64"):
        limits = np.iinfo(NUMPY[to])
        for mode, f in functions.items():
            got = execute(f"cvt.{mode}.{to}.{source} {{d}}, {{a}};", to, {"a": (source, a)})
            for g, v in zip(got, x, strict=True):
                if not math.isnan(v):
                    assert g == (
                        limits.max
                        if v >= 2.0**63 * 2
                        else limits.min
                        if v == -math.inf
                        else max(min(int(f(v)), limits.max), limits.min)
                    )


@pytest.mark.parametrize("to", ["f16", "bf16", "f32", "f64"])
def test_to_float(to: str) -> None:
    for source in ("s16", "u16", "s32", "u32", "s64", "u64"):
        a = samples(source, 1)
        got = execute(f"cvt.rn.{to}.{source} {{d}}, {{a}};", to, {"a": (source, a)})
        with np.errstate(all="ignore"):
            x = a.astype(np.float64) if to != "f32" else a.astype(np.float32)
            expected = (
                torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
                if to == "bf16"
                else x.astype(NUMPY[to])
            )
        same(to, got, expected)
    for source in ("f16", "bf16", "f32", "f64"):
        if source == to:
            continue
        a = samples(source, 1)
        exact = NUMPY[source].itemsize < NUMPY[to].itemsize
        got = execute(
            f"cvt{'' if exact else '.rn'}.{to}.{source} {{d}}, {{a}};", to, {"a": (source, a)}
        )
        x = widen(source, a)
        if to == "bf16":
            expected = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
        else:
            with np.errstate(all="ignore"):
                expected = x.astype(NUMPY[to])
        same(to, got, expected)


def test_packed_and_clamped_conversions() -> None:
    a, b = samples("f32", 1), samples("f32", 2)
    inputs = {"a": ("f32", a), "b": ("f32", b)}
    for kind in ("f16", "bf16"):
        for relu in (False, True):
            got = execute(
                f"cvt.rn{'.relu' * relu}.{kind}x2.f32 {{d}}, {{a}}, {{b}};", f"{kind}x2", inputs
            )
            x, y = (np.where(v < 0, np.float32(0), v + 0) if relu else v for v in (a, b))
            high, low = (narrow(kind, v).view(np.uint16).astype(np.uint32) for v in (x, y))
            if relu:  # -0 and what rounds to it becomes +0
                high, low = (np.where(v == 0x8000, 0, v) for v in (high, low))
            same(f"{kind}x2", got, low | high << 16)
    got = execute("cvt.sat.f32.f32 {d}, {a};", "f32", {"a": ("f32", a)})
    same("f32", got, np.where(a > 0, np.minimum(a, 1), 0).astype(np.float32))
    got = execute("cvt.rni.f32.f32 {d}, {a};", "f32", {"a": ("f32", a)})
    same("f32", got, np.rint(a))


def test_tf32_rounding() -> None:
    a = samples("f32", 1)
    a = a[np.isfinite(a) & (np.abs(a) < 1e38)][: 3 * 128]
    got = execute("cvt.rna.tf32.f32 {d}, {a};", "tf32", {"a": ("f32", a)})
    same("tf32", got, (a.view(np.uint32) + 0x1000) & 0xFFFFE000)


@pytest.mark.parametrize("mode", ["rz", "rn"])
@pytest.mark.parametrize("to", ["f16", "bf16"])
def test_narrowing_rounds_to_a_neighbour(to: str, mode: str) -> None:
    a = np.random.default_rng(5).standard_normal(N).astype(np.float32)
    got = widen(to, execute(f"cvt.{mode}.{to}.f32 {{d}}, {{a}};", to, {"a": ("f32", a)}))
    if mode == "rn":
        assert (got == widen(to, narrow(to, a))).all()
    else:
        bits = narrow(to, a).view(np.uint16)
        toward_zero = np.where(np.abs(widen(to, bits.view(NUMPY[to]))) > np.abs(a), bits - 1, bits)
        assert (got == widen(to, toward_zero.astype(np.uint16).view(NUMPY[to]))).all()


def test_moves_pack_and_unpack() -> None:
    a, b = samples("u16", 1), samples("u16", 2)
    got = execute("mov.b32 {d}, {{{a}, {b}}};", "b32", {"a": ("u16", a), "b": ("u16", b)})
    same("b32", got, a.astype(np.uint32) | b.astype(np.uint32) << 16)
    c = samples("u64", 3)
    got = execute(
        ".reg .b32 %l, %h; mov.b64 {{%l, %h}}, {c}; mov.b64 {d}, {{%h, %l}};",
        "b64",
        {"c": ("u64", c)},
    )
    same("b64", got, c >> np.uint64(32) | c << np.uint64(32))


def test_constants() -> None:
    a = samples("f32", 1)
    got = execute("mul.f32 {d}, {a}, 0f3F000000;", "f32", {"a": ("f32", a)})
    same("f32", got, a * np.float32(0.5))
    got = execute(
        "add.f64 {d}, {a}, 0d3FF8000000000000;", "f64", {"a": ("f64", a.astype(np.float64))}
    )
    same("f64", got, a.astype(np.float64) + 1.5)
    n = samples("s32", 1)
    same("s32", execute("add.s32 {d}, {a}, -0x10;", "s32", {"a": ("s32", n)}), n - 16)

"""Floating-point arithmetic, bit for bit wherever PTX defines the bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from instructions import NUMPY, N, execute, narrow, same, samples, widen

FLOAT_BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64", "f16x2", "bf16x2"])
@pytest.mark.parametrize("name", [*FLOAT_BINARY, "min", "max", "fma", "neg", "abs"])
def test_float_arithmetic(name: str, kind: str) -> None:
    scalar = kind.removesuffix("x2")
    arrays = [samples(kind, i) for i in (1, 2, 3)]
    arity = 1 if name in ("neg", "abs") else 3 if name == "fma" else 2
    opcode = f"{name}.rn.{kind}" if name == "fma" else f"{name}.{kind}"

    def reference(*x: np.ndarray) -> np.ndarray:
        x = tuple(widen(scalar, v) for v in x)
        with np.errstate(all="ignore"):
            if name in FLOAT_BINARY:
                return narrow(scalar, FLOAT_BINARY[name](*x))
            if name in ("min", "max"):
                smaller = (x[0] < x[1]) | ((x[0] == x[1]) & np.signbit(x[0]))
                pick = np.where(smaller == (name == "min"), x[0], x[1])
                return narrow(
                    scalar, np.where(np.isnan(x[0]), x[1], np.where(np.isnan(x[1]), x[0], pick))
                )
            if name == "fma":
                return narrow(scalar, exact_fma(scalar, *x))
        if name == "neg":
            return narrow(scalar, -x[0])
        return narrow(scalar, np.abs(x[0]))

    names = ["a", "b", "c"][:arity]
    inputs = {n: (kind, v) for n, v in zip(names, arrays, strict=False)}
    got = execute(f"{opcode} {{d}}, {', '.join(f'{{{n}}}' for n in names)};", kind, inputs)
    if kind == scalar:
        expected = reference(*arrays[:arity])
    else:
        parts = [
            [((v >> s) & 0xFFFF).astype(np.uint16).view(NUMPY[scalar]) for v in arrays[:arity]]
            for s in (0, 16)
        ]
        low, high = (reference(*p).view(np.uint16).astype(np.uint32) for p in parts)
        expected = low | high << 16
    same(kind, got, expected)


def exact_fma(kind: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c with one rounding, by fractions; not finite values by the hardware's own rules."""
    from fractions import Fraction

    out = (a * b + c).astype(np.float64)
    for i, row in enumerate(zip(a, b, c, strict=True)):
        if not all(map(math.isfinite, row)):
            continue
        x = Fraction(float(row[0])) * Fraction(float(row[1])) + Fraction(float(row[2]))
        if x == 0:
            continue
        digits = {"f16": 11, "bf16": 8, "f32": 24, "f64": 53}[kind]
        smallest = {"f16": -24, "bf16": -133, "f32": -149, "f64": -1074}[kind]
        exponent = math.floor(math.log2(abs(x.numerator)) - math.log2(x.denominator))
        exponent += (
            1
            if abs(x) >= Fraction(2) ** (exponent + 1)
            else -1
            if abs(x) < Fraction(2) ** exponent
            else 0
        )
        unit = Fraction(2) ** max(exponent - digits + 1, smallest)
        scaled = x / unit
        rounded = scaled.numerator // scaled.denominator
        rest = scaled - rounded
        if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and rounded % 2):
            rounded += 1
        try:
            out[i] = float(rounded * unit)
        except OverflowError:
            out[i] = math.inf if x > 0 else -math.inf
    return out


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["add", "mul", "fma"])
def test_directed_rounding(name: str, mode: str) -> None:
    """The result is the neighbour of the exact value on the side that the mode names."""
    from fractions import Fraction

    generator = np.random.default_rng(7)
    a, b, c = (
        generator.standard_normal(N).astype(np.float32)
        * np.float32(2.0) ** generator.integers(-9, 9, N).astype(np.float32)
        for _ in range(3)
    )
    names = ["a", "b", "c"][: 3 if name == "fma" else 2]
    inputs = {n: ("f32", v) for n, v in zip(names, (a, b, c), strict=False)}
    got = execute(
        f"{name}.{mode}.f32 {{d}}, {', '.join(f'{{{n}}}' for n in names)};", "f32", inputs
    )
    for x, y, z, r in zip(a, b, c, got, strict=True):
        x, y, z = (Fraction(float(v)) for v in (x, y, z))
        exact = {"add": x + y, "mul": x * y, "fma": x * y + z}[name]
        down = mode == "rm" or (mode == "rz" and exact > 0)
        beyond = np.nextafter(r, np.float32(np.inf if down else -np.inf))
        r_exact, next_exact = Fraction(float(r)), Fraction(float(beyond))
        assert (r_exact <= exact < next_exact) if down else (next_exact < exact <= r_exact)


def test_division_and_roots() -> None:
    a, b = samples("f32", 1), samples("f32", 2)
    with np.errstate(all="ignore"):
        expected = {
            "div.rn.f32 {d}, {a}, {b};": a / b,
            "rcp.rn.f32 {d}, {a};": np.float32(1) / a,
            "sqrt.rn.f32 {d}, {a};": np.sqrt(a),
            "add.sat.f32 {d}, {a}, {b};": np.where(np.isnan(a + b), 0, np.clip(a + b, 0, 1))
            + np.float32(0),
            "copysign.f32 {d}, {a}, {b};": np.copysign(b, a),
        }
    for instruction, value in expected.items():
        inputs = {"a": ("f32", a)} | ({"b": ("f32", b)} if "{b}" in instruction else {})
        same("f32", execute(instruction, "f32", inputs), value.astype(np.float32))


def test_approximations() -> None:
    """.approx results are what a correct library gives, within its rounding."""
    a = np.random.default_rng(3).standard_normal(N).astype(np.float32) * 5
    functions = {
        "ex2": np.exp2,
        "lg2": np.log2,
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "sin": np.sin,
        "cos": np.cos,
        "tanh": np.tanh,
    }
    for name, f in functions.items():
        x = np.abs(a) + np.float32(0.01) if name in ("lg2", "rsqrt") else a
        got = execute(f"{name}.approx.f32 {{d}}, {{a}};", "f32", {"a": ("f32", x)})
        np.testing.assert_allclose(got, f(x.astype(np.float64)), rtol=2e-7, atol=1e-7)

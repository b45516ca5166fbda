"""Comparison, predicates and selection against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from instructions import LOGIC, N, execute, same, samples, widen

COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@pytest.mark.parametrize(
    "kind", ["s16", "u16", "s32", "u32", "s64", "u64", "f32", "f64", "f16", "bf16"]
)
def test_comparisons(kind: str) -> None:
    floating = kind[0] == "f" or kind == "bf16"
    a, b = samples(kind, 1), samples(kind, 2)
    b[::3] = a[::3]
    inputs = {"a": (kind, a), "b": (kind, b)}
    x, y = (widen(kind, a), widen(kind, b)) if floating else (a, b)
    tests = dict(COMPARISONS)
    unordered = np.isnan(x) | np.isnan(y) if floating else np.zeros(N, bool)
    for name, f in tests.items():
        expected = f(x, y) & ~unordered
        got = execute(f"setp.{name}.{kind} {{d}}, {{a}}, {{b}};", "pred", inputs)
        assert (got == expected).all(), name
        if floating:
            got = execute(f"setp.{name}u.{kind} {{d}}, {{a}}, {{b}};", "pred", inputs)
            assert (got == (expected | unordered)).all(), name + "u"
    if floating:
        assert (execute(f"setp.nan.{kind} {{d}}, {{a}}, {{b}};", "pred", inputs) == unordered).all()
        assert (
            execute(f"setp.num.{kind} {{d}}, {{a}}, {{b}};", "pred", inputs) == ~unordered
        ).all()
    if kind[0] == "u":
        for name, plain in UNSIGNED.items():
            assert (
                execute(f"setp.{name}.{kind} {{d}}, {{a}}, {{b}};", "pred", inputs)
                == tests[plain](x, y)
            ).all()
    got = execute(f"set.lt.u32.{kind} {{d}}, {{a}}, {{b}};", "u32", inputs)
    assert (got == np.where((x < y) & ~unordered, 0xFFFFFFFF, 0)).all()


@pytest.mark.parametrize("operator", LOGIC)
@pytest.mark.parametrize("negated", [False, True])
def test_comparison_with_boolean(operator: str, negated: bool) -> None:
    a, b, c = (samples("s32", i) for i in (1, 2, 3))
    inputs = {"a": ("s32", a), "b": ("s32", b), "c": ("s32", c)}
    body = ".reg .pred %p, %q; setp.gt.s32 %p, {c}, 5;"
    body += f"setp.lt.{operator}.s32 {{d}}|%q, {{a}}, {{b}}, {'!' * negated}%p;"
    p = (c > 5) ^ negated
    assert (execute(body, "pred", inputs) == LOGIC[operator](a < b, p)).all()
    body = body.replace("{d}|%q", "%q|{d}")
    assert (execute(body, "pred", inputs) == LOGIC[operator](a >= b, p)).all()


def test_predicates_and_selection() -> None:
    a, b = samples("s32", 1), samples("s32", 2)
    inputs = {"a": ("s32", a), "b": ("s32", b)}
    setup = ".reg .pred %p, %q; setp.gt.s32 %p, {a}, 3; setp.gt.s32 %q, {b}, 3;\n"
    for name, f in LOGIC.items():
        assert (
            execute(setup + f"{name}.pred {{d}}, %p, %q;", "pred", inputs) == f(a > 3, b > 3)
        ).all()
    assert (execute(setup + "not.pred {d}, %p;", "pred", inputs) == ~(a > 3)).all()
    same(
        "s32", execute(setup + "selp.s32 {d}, {a}, {b}, %q;", "s32", inputs), np.where(b > 3, a, b)
    )
    same(
        "s32",
        execute(setup + "mov.s32 {d}, {a};\n@!%p mov.b32 {d}, 17;", "s32", inputs),
        np.where(a > 3, a, 17),
    )

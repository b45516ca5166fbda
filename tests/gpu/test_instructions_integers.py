"""Integer arithmetic and logic against Python's integers, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from instructions import LOGIC, NUMPY, each, execute, same, samples


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER_BINARY: dict[str, Callable[[int, int], int]] = {
    "add.{t}": lambda a, b: a + b,
    "sub.{t}": lambda a, b: a - b,
    "mul.lo.{t}": lambda a, b: a * b,
    "min.{t}": min,
    "max.{t}": max,
    "div.{t}": lambda a, b: truncated(a, b) if b else -1,
    "rem.{t}": lambda a, b: a - b * truncated(a, b) if b else a,
}


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("opcode", [*INTEGER_BINARY, "mul.hi.{t}"])
def test_integer_binary(opcode: str, kind: str) -> None:
    bits = 8 * NUMPY[kind].itemsize
    f = INTEGER_BINARY.get(opcode, lambda a, b: a * b >> bits)
    a, b = samples(kind, 1), samples(kind, 2)
    got = execute(
        f"{opcode.format(t=kind)} {{d}}, {{a}}, {{b}};", kind, {"a": (kind, a), "b": (kind, b)}
    )
    same(kind, got, each(f, kind, a, b))


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32"])
def test_wide_products(kind: str) -> None:
    wide = kind[0] + str(2 * int(kind[1:]))
    a, b, c = samples(kind, 1), samples(kind, 2), samples(wide, 3)
    got = execute(f"mul.wide.{kind} {{d}}, {{a}}, {{b}};", wide, {"a": (kind, a), "b": (kind, b)})
    same(wide, got, each(lambda a, b: a * b, wide, a, b))
    got = execute(
        f"mad.wide.{kind} {{d}}, {{a}}, {{b}}, {{c}};",
        wide,
        {"a": (kind, a), "b": (kind, b), "c": (wide, c)},
    )
    same(wide, got, each(lambda a, b, c: a * b + c, wide, a, b, c))


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("half", ["lo", "hi"])
def test_multiply_add(kind: str, half: str) -> None:
    a, b, c = (samples(kind, i) for i in range(3))
    got = execute(
        f"mad.{half}.{kind} {{d}}, {{a}}, {{b}}, {{c}};",
        kind,
        {"a": (kind, a), "b": (kind, b), "c": (kind, c)},
    )
    shift = 8 * NUMPY[kind].itemsize if half == "hi" else 0
    same(kind, got, each(lambda a, b, c: (a * b >> shift) + c, kind, a, b, c))


def test_carry_chain() -> None:
    a, b = samples("u64", 1), samples("u64", 2)
    halves = {"a": ("u64", a), "b": ("u64", b)}
    split = ".reg .b32 %l, %h, %m, %k; mov.b64 {{%l, %h}}, {a}; mov.b64 {{%m, %k}}, {b};\n"
    got = execute(
        split + "add.cc.u32 %l, %l, %m; addc.u32 %h, %h, %k; mov.b64 {d}, {{%l, %h}};",
        "u64",
        halves,
    )
    same("u64", got, a + b)
    got = execute(
        split + "sub.cc.u32 %l, %l, %m; subc.u32 %h, %h, %k; mov.b64 {d}, {{%l, %h}};",
        "u64",
        halves,
    )
    same("u64", got, a - b)
    got = execute(
        split + "mad.lo.cc.u32 %k, %l, %m, %m; madc.hi.u32 %h, %l, %m, 0; mov.b64 {d}, {{%k, %h}};",
        "u64",
        halves,
    )
    same(
        "u64",
        got,
        each(lambda a, b: (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF) + (b & 0xFFFFFFFF), "u64", a, b),
    )


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_integer_unary(kind: str) -> None:
    a = samples(kind, 1)
    same(
        kind,
        execute(f"neg.{kind} {{d}}, {{a}};", kind, {"a": (kind, a)}),
        each(lambda a: -a, kind, a),
    )
    same(kind, execute(f"abs.{kind} {{d}}, {{a}};", kind, {"a": (kind, a)}), each(abs, kind, a))


def test_saturating_addition() -> None:
    a, b = samples("s32", 1), samples("s32", 2)
    got = execute("add.sat.s32 {d}, {a}, {b};", "s32", {"a": ("s32", a), "b": ("s32", b)})
    same("s32", got, np.clip(a.astype(np.int64) + b, -(2**31), 2**31 - 1).astype(np.int32))


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_logic_and_shifts(kind: str) -> None:
    a, b, n = samples(kind, 1), samples(kind, 2), samples("u32", 3) % 80
    bits = 8 * NUMPY[kind].itemsize
    for name, f in LOGIC.items():
        same(
            kind,
            execute(f"{name}.{kind} {{d}}, {{a}}, {{b}};", kind, {"a": (kind, a), "b": (kind, b)}),
            f(a, b),
        )
    same(kind, execute(f"not.{kind} {{d}}, {{a}};", kind, {"a": (kind, a)}), ~a)
    same(
        kind,
        execute(f"cnot.{kind} {{d}}, {{a}};", kind, {"a": (kind, a)}),
        (a == 0).astype(a.dtype),
    )
    shifted = {"a": (kind, a), "n": ("u32", n)}
    same(
        kind,
        execute(f"shl.{kind} {{d}}, {{a}}, {{n}};", kind, shifted),
        each(lambda a, n: a << n, kind, a, n),
    )
    for t in (f"u{bits}", f"s{bits}"):
        v = a.view(NUMPY[t])
        same(
            t,
            execute(f"shr.{t} {{d}}, {{a}}, {{n}};", t, {"a": (t, v), "n": ("u32", n)}),
            each(lambda a, n: a >> n, t, v, n),
        )


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(mode: str) -> None:
    a, b, n = samples("u32", 1), samples("u32", 2), samples("u32", 3) % 40
    inputs = {"a": ("u32", a), "b": ("u32", b), "n": ("u32", n)}

    def amount(n: int) -> int:
        return n & 31 if mode == "wrap" else min(n, 32)

    left = each(lambda a, b, n: (b << 32 | a) << amount(n) >> 32, "u32", a, b, n)
    right = each(lambda a, b, n: (b << 32 | a) >> amount(n), "u32", a, b, n)
    same("u32", execute(f"shf.l.{mode}.b32 {{d}}, {{a}}, {{b}}, {{n}};", "u32", inputs), left)
    same("u32", execute(f"shf.r.{mode}.b32 {{d}}, {{a}}, {{b}}, {{n}};", "u32", inputs), right)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind: str) -> None:
    bits = 8 * NUMPY[kind].itemsize
    a, b = samples(kind, 1), samples(kind, 2)
    start, length = samples("u32", 3) % 70, samples("u32", 4) % 70

    def extract(
        a: int, start: int, length: int
    ) -> int:  # the pseudo-code of the ISA manual, bit by bit
        msb = bits - 1
        sign = 0
        if kind[0] == "s" and length:
            sign = a >> min(start + length - 1, msb) & 1
        out = sum(
            (a >> (start + i) & 1) << i for i in range(bits) if i < length and start + i <= msb
        )
        return out | sum(sign << i for i in range(bits) if not (i < length and start + i <= msb))

    inputs = {"a": (kind, a), "s": ("u32", start), "n": ("u32", length)}
    same(
        kind,
        execute(f"bfe.{kind} {{d}}, {{a}}, {{s}}, {{n}};", kind, inputs),
        each(extract, kind, a, start, length),
    )

    def insert(a: int, b: int, start: int, length: int) -> int:
        mask = (((1 << length) - 1) << start) & ((1 << bits) - 1)
        return (b & ~mask) | (a << start & mask)

    inputs = {"a": (kind, a), "b": (kind, b), "s": ("u32", start), "n": ("u32", length)}
    same(
        kind,
        execute(f"bfi.b{bits} {{d}}, {{a}}, {{b}}, {{s}}, {{n}};", kind, inputs),
        each(insert, kind, a, b, start, length),
    )


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_bit_counts(kind: str) -> None:
    bits = 8 * NUMPY[kind].itemsize
    a = samples(kind, 1)
    inputs = {"a": (kind, a)}
    same(
        "u32",
        execute(f"popc.{kind} {{d}}, {{a}};", "u32", inputs),
        each(lambda a: a.bit_count(), "u32", a),
    )
    same(
        "u32",
        execute(f"clz.{kind} {{d}}, {{a}};", "u32", inputs),
        each(lambda a: bits - a.bit_length(), "u32", a),
    )
    same(
        kind,
        execute(f"brev.{kind} {{d}}, {{a}};", kind, inputs),
        each(lambda a: int(f"{a:0{bits}b}"[::-1], 2), kind, a),
    )
    same(
        "u32",
        execute(f"bfind.u{bits} {{d}}, {{a}};", "u32", inputs),
        each(lambda a: a.bit_length() - 1, "u32", a),
    )


def test_permute_bytes_and_lookup_logic() -> None:
    a, b, c = samples("u32", 1), samples("u32", 2), samples("u32", 3)
    inputs = {"a": ("u32", a), "b": ("u32", b), "c": ("u32", c)}

    def permute(a: int, b: int, selector: int) -> int:
        source = (b << 32 | a).to_bytes(8, "little")
        picked = [(source[s & 7], s & 8) for s in (selector >> 4 * i & 15 for i in range(4))]
        return int.from_bytes(
            bytes((255 if v & 128 else 0) if sign else v for v, sign in picked), "little"
        )

    same(
        "u32", execute("prmt.b32 {d}, {a}, {b}, {c};", "u32", inputs), each(permute, "u32", a, b, c)
    )
    for table, f in (
        (0xF8, a | (b & c)),
        (0x96, a ^ b ^ c),
        (0xCA, (a & b) | (~a & c)),
        (0x1E, a ^ (b | c)),
    ):
        same("u32", execute(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table:#x};", "u32", inputs), f)

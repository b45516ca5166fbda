"""The PTX machine's instructions against numpy, bit for bit wherever PTX defines the bits."""

from __future__ import annotations

import math
from collections.abc import Callable

import device
import numpy as np
import pytest
import torch

NUMPY = {
    **{f"u{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)},
    **{f"s{n}": np.dtype(f"i{n // 8}") for n in (8, 16, 32, 64)},
    **{f"b{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)},
    **{"f16": np.dtype("f2"), "bf16": np.dtype("u2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")},
    **{"f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4"), "tf32": np.dtype("u4")},
}
N = 512


def register_type(kind: str) -> str:
    return f"b{max(8 * NUMPY[kind].itemsize, 16)}"


def execute(instruction: str, out: str, inputs: dict[str, tuple[str, np.ndarray]]) -> np.ndarray:
    """Runs `instruction` once for each element; a `pred` result reads as 0, 1.

    Its registers are {d} and the names in `inputs`.
    """
    names = list(inputs)
    stored = "b32" if out == "pred" else out
    lines = []
    for i, (name, (kind, _)) in enumerate(inputs.items(), start=1):
        size = NUMPY[kind].itemsize
        lines.append(
            f"ld.param.u64 %base, [p{i}]; mul.wide.u32 %at, %tid, {size}; add.s64 %at, %at, %base;"
        )
        lines.append(f"ld.global.b{8 * size} %{name}, [%at];")
    size = NUMPY[stored].itemsize
    registers = [f".reg .{register_type(kind)} %{name};" for name, (kind, _) in inputs.items()]
    registers.append(f".reg .{'pred' if out == 'pred' else register_type(out)} %d;")
    body = instruction.format(d="%d", **{n: f"%{n}" for n in names})
    result = "%d"
    if out == "pred":
        body += "\nselp.b32 %flag, 1, 0, %d;"
        result = "%flag"
    text = f"""
.version 8.7
.target sm_90
.address_size 64
.visible .entry kernel({", ".join(f".param .u64 p{i}" for i in range(len(names) + 1))})
{{
.reg .b64 %base, %at; .reg .b32 %tid, %cta, %flag;
{" ".join(registers)}
mov.u32 %tid, %tid.x;
mov.u32 %cta, %ctaid.x;
mad.lo.u32 %tid, %cta, 128, %tid;
{chr(10).join(lines)}
{body}
ld.param.u64 %base, [p0]; mul.wide.u32 %at, %tid, {size}; add.s64 %at, %at, %base;
st.global.b{8 * size} [%at], {result};
ret;
}}
"""
    n = len(next(iter(inputs.values()))[1])
    assert n % 128 == 0
    result_array = torch.from_numpy(np.zeros(n * size, np.uint8))
    arguments = [
        torch.from_numpy(np.ascontiguousarray(v, NUMPY[k]).view(np.uint8).copy())
        for k, v in inputs.values()
    ]
    device.ptx(text, "kernel", (n // 128,), (128,), result_array, *arguments)
    return result_array.numpy().view(NUMPY[stored])


def samples(kind: str, seed: int = 0) -> np.ndarray:
    """Random values and every corner that the type has."""
    generator = np.random.default_rng([seed, *kind.encode()])
    dtype = NUMPY[kind]
    if kind in ("f16", "f32", "f64"):
        corners = [
            0.0,
            -0.0,
            1.0,
            -1.0,
            0.5,
            1.5,
            2.5,
            np.inf,
            -np.inf,
            np.nan,
            np.finfo(dtype).max,
            np.finfo(dtype).tiny,
        ]
        corners += [np.finfo(dtype).smallest_subnormal, -np.finfo(dtype).max]
        values = (generator.standard_normal(N) * 10.0 ** generator.integers(-3, 4, N)).astype(dtype)
        values[: len(corners)] = corners
        return generator.permutation(values)
    if kind == "bf16":
        return bf16_bits(samples("f32", seed))
    if kind in ("f16x2", "bf16x2"):
        low, high = (samples(kind[:-2], seed + i).view(np.uint16).astype(np.uint32) for i in (1, 2))
        return low | high << 16
    bits = generator.integers(0, 2**64, N, np.uint64) >> generator.integers(0, 64, N, np.uint64)
    values = bits.astype(dtype)
    corners = [0, 1, 2, 3, 5, 7, 31, 32, 33, 63, 64, 65, 255]
    values[: len(corners)] = np.array(corners, np.uint64).astype(dtype)
    values[len(corners)] = np.iinfo(dtype).max
    values[len(corners) + 1] = np.iinfo(dtype).min
    return generator.permutation(values)


def bf16_bits(x: np.ndarray) -> np.ndarray:
    return (
        torch.from_numpy(x.astype(np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    )


def bf16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def widen(kind: str, x: np.ndarray) -> np.ndarray:
    """Values of a floating type in fp32 or fp64."""
    if kind == "bf16":
        return bf16_values(x)
    return x.astype(np.float64) if kind == "f64" else x.astype(np.float32)


def narrow(kind: str, x: np.ndarray) -> np.ndarray:
    if kind == "bf16":
        return bf16_bits(x)
    with np.errstate(all="ignore"):
        return x.astype(NUMPY[kind])


def same(kind: str, got: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits; any NaN equals any NaN."""
    if kind in ("f16x2", "bf16x2"):
        for shift in (0, 16):
            halves = [
                ((x >> shift) & 0xFFFF).astype(np.uint16).view(NUMPY[kind[:-2]])
                for x in (got, expected)
            ]
            same(kind[:-2], *halves)
        return
    floating = kind in ("f16", "bf16", "f32", "f64")
    nan = np.zeros(len(got), bool)
    if floating:
        a, b = widen(kind, got), widen(kind, expected)
        assert (np.isnan(a) == np.isnan(b)).all()
        nan = np.isnan(a)
    bits = f"u{got.dtype.itemsize}"
    different = np.flatnonzero((got.view(bits) != expected.view(bits)) & ~nan)
    assert not different.size, (
        f"{different.size} differ, first {got[different[0]]!r}, expected {expected[different[0]]!r}"
    )


def each(f: Callable[..., int], kind: str, *arrays: np.ndarray) -> np.ndarray:
    """f in Python's integers, wrapped to the type."""
    mask = (1 << 8 * NUMPY[kind].itemsize) - 1
    values = [f(*map(int, row)) & mask for row in zip(*arrays, strict=True)]
    return np.array(values, f"u{NUMPY[kind].itemsize}").view(NUMPY[kind])


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


LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


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


# ---- exchange between the lanes of a warp


def by_warp(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, 32)


def test_shuffles() -> None:
    a = samples("u32", 1)
    lane = np.arange(32)
    sources = {
        "bfly.b32 {d}, {a}, 5, 31": lane ^ 5,
        "down.b32 {d}, {a}, 3, 31": np.where(lane + 3 < 32, lane + 3, lane),
        "up.b32 {d}, {a}, 3, 0": np.where(lane >= 3, lane - 3, lane),
        "idx.b32 {d}, {a}, 9, 31": np.full(32, 9),
        "bfly.b32 {d}, {a}, 1, 0x181f": lane ^ 1,  # segments of 8
        "down.b32 {d}, {a}, 3, 0x181f": np.where(lane % 8 + 3 < 8, lane + 3, lane),
        "idx.b32 {d}, {a}, 2, 0x181f": lane // 8 * 8 + 2,
    }
    for operands, source in sources.items():
        got = execute(f"shfl.sync.{operands}, -1;", "u32", {"a": ("u32", a)})
        assert (by_warp(got) == by_warp(a)[:, source]).all(), operands


def test_votes_and_reductions() -> None:
    a = samples("s32", 1)
    inputs = {"a": ("s32", a)}
    positive = by_warp(a > 3)
    setup = ".reg .pred %p, %q; setp.gt.s32 %p, {a}, 3;\n"
    ballot = (positive.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
    assert (
        by_warp(execute(setup + "vote.sync.ballot.b32 {d}, %p, -1;", "u32", inputs))
        == ballot[:, None]
    ).all()
    assert (
        by_warp(execute(setup + "vote.sync.any.pred {d}, %p, -1;", "pred", inputs))
        == positive.any(1)[:, None]
    ).all()
    assert (
        by_warp(execute(setup + "vote.sync.all.pred {d}, !%p, -1;", "pred", inputs))
        == (~positive).all(1)[:, None]
    ).all()
    rows = by_warp(a)
    for name, expected in {
        "add": rows.astype(np.int64).sum(1).astype(np.int32),
        "min": rows.min(1),
        "max": rows.max(1),
    }.items():
        assert (
            by_warp(execute(f"redux.sync.{name}.s32 {{d}}, {{a}}, -1;", "s32", inputs))
            == expected[:, None]
        ).all()
    for name, f in LOGIC.items():
        expected = f.reduce(rows.view(np.uint32), axis=1)
        assert (
            by_warp(execute(f"redux.sync.{name}.b32 {{d}}, {{a}}, -1;", "u32", inputs))
            == expected[:, None]
        ).all()
    small = samples("u32", 2) % 5
    equal = (by_warp(small)[:, :, None] == by_warp(small)[:, None, :]).astype(
        np.uint64
    ) << np.arange(32, dtype=np.uint64)
    got = execute("match.any.sync.b32 {d}, {a}, -1;", "u32", {"a": ("u32", small)})
    assert (by_warp(got) == equal.sum(2).astype(np.uint32)).all()
    assert (execute("activemask.b32 {d};", "u32", inputs) == 0xFFFFFFFF).all()
    got = by_warp(execute(".reg .b32 %leader; elect.sync %leader|{d}, -1;", "pred", inputs))
    assert got[:, 0].all() and not got[:, 1:].any()


def test_special_registers() -> None:
    dummy = {"a": ("u32", samples("u32", 1))}
    thread = np.arange(N)
    expected = {
        **{
            "tid.x": thread % 128,
            "ntid.x": 128,
            "ctaid.x": thread // 128,
            "nctaid.x": N // 128,
            "tid.y": 0,
            "ntid.z": 1,
        },
        **{"laneid": thread % 32, "warpid": thread % 128 // 32, "nwarpid": 4},
        **{
            "lanemask_lt": (1 << thread % 32) - 1,
            "lanemask_eq": 1 << thread % 32,
            "lanemask_ge": -1 << thread % 32,
        },
    }
    for name, value in expected.items():
        got = execute(f"mov.u32 {{d}}, %{name};", "u32", dummy)
        assert (got == np.broadcast_to(value, N).astype(np.int64).astype(np.uint32)).all(), name


def test_branches_reconverge() -> None:
    """A loop whose length differs by thread, then an instruction of the whole warp."""
    a = samples("u32", 1) % 40
    body = """.reg .pred %p; .reg .b32 %i; mov.u32 {d}, 0; mov.u32 %i, 0;
$loop: setp.ge.u32 %p, %i, {a};
@%p bra $end;
add.u32 {d}, {d}, %i; add.u32 %i, %i, 1;
bra $loop;
$end: shfl.sync.bfly.b32 {d}, {d}, 1, 31, -1;"""
    got = execute(body, "u32", {"a": ("u32", a)})
    expected = (a * (a - 1) // 2)[np.arange(N) ^ 1]
    assert (got == np.where(a[np.arange(N) ^ 1] == 0, 0, expected)).all()


@pytest.mark.parametrize(
    ("kind", "op"),
    [
        (k, op)
        for k in ("u32", "s32", "u64")
        for op in ("add", "min", "max", "and", "or", "xor", "exch")
    ]
    + [
        ("f32", "add"),
        ("f64", "add"),
        ("f16x2", "add.noftz"),
        ("bf16x2", "add.noftz"),
        ("u32", "inc"),
    ],
)
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics(space: str, kind: str, op: str) -> None:
    """All threads of a block on one word; what was there is returned to exactly one of them."""
    if (op in LOGIC and kind[0] != "b") or op == "exch":
        kind_text = f"b{8 * NUMPY[kind].itemsize}"
    else:
        kind_text = kind
    size = NUMPY[kind].itemsize
    small = (samples("u32", 9) % 50)[:128]
    if kind in ("f16x2", "bf16x2"):
        halves = narrow(kind[:-2], small.astype(np.float32)).view(np.uint16).astype(np.uint32)
        values = halves | halves << 16
    else:
        values = small.astype(NUMPY[kind])
    place = "[%at]" if space == "global" else "[word]"
    initial = (
        ""
        if space == "global"
        else f"""mov.b{8 * size} %v, 0; setp.eq.u32 %p, %tid, 0;
@%p st.shared.b{8 * size} [word], %v; bar.sync 0;"""
    )
    final = f"@%p ld.shared.b{8 * size} %v, [word]; @%p st.global.b{8 * size} [%at], %v;"
    if space == "global":
        final = ""
    text = f"""
.version 8.7
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 p0, .param .u64 p1, .param .u64 p2)
{{
.reg .b64 %at, %from, %to; .reg .b32 %tid; .reg .b{8 * size} %v, %old; .reg .pred %p;
.shared .align 16 .b8 word[16];
mov.u32 %tid, %tid.x;
ld.param.u64 %at, [p0]; ld.param.u64 %from, [p1]; ld.param.u64 %to, [p2];
mad.wide.u32 %from, %tid, {size}, %from; mad.wide.u32 %to, %tid, {size}, %to;
{initial}
ld.global.b{8 * size} %v, [%from];
atom.{space}.{op}.{kind_text} %old, {place}, %v;
st.global.b{8 * size} [%to], %old;
bar.sync 0;
setp.eq.u32 %p, %tid, 0;
{final}
ret;
}}
"""
    word = torch.zeros(size, dtype=torch.uint8)
    old = torch.zeros(128 * size, dtype=torch.uint8)
    given = torch.from_numpy(values.view(np.uint8).copy())
    device.ptx(text, "kernel", (1,), (128,), word, given, old, seed=3)
    result, returned = word.numpy().view(values.dtype)[0], old.numpy().view(values.dtype)
    if op.startswith("add"):
        total = np.float32(small.sum())
        if kind in ("f16x2", "bf16x2"):
            expected = small.astype(np.float64).sum()
            got = widen(
                kind[:-2], np.array([result & 0xFFFF]).astype(np.uint16).view(NUMPY[kind[:-2]])
            )[0]
            assert abs(got - expected) <= 2.0**-5 * expected
        else:
            assert result == total
            assert set(returned) <= {*np.arange(int(total) + 1)}
    elif op == "inc":
        assert result < 50
    elif op == "exch":
        assert sorted([*returned, result]) == sorted([0, *values])
    else:
        f = {"min": np.minimum, "max": np.maximum, **LOGIC}[op]
        assert result == f.reduce(np.array([0, *values], values.dtype))


def test_compare_and_swap() -> None:
    a = samples("u32", 1)
    body = ".reg .b32 %expected; mov.u32 %expected, 7;"
    body += "atom.global.cas.b32 {d}, [%at], %expected, 99;"
    a[::4] = 7
    arguments = {"a": ("u32", a)}
    assert (execute(body, "u32", arguments) == a).all()


@pytest.mark.parametrize(
    ("kind", "width"),
    [(k, w) for k in ("b8", "b16", "b32", "b64") for w in (1, 2, 4) if (k, w) != ("b64", 4)],
)
def test_vector_memory(kind: str, width: int) -> None:
    """Loads and stores of every width through global, shared and local memory."""
    size = NUMPY[kind].itemsize
    vector = f".v{width}" if width > 1 else ""
    names = ", ".join(f"%x{i}" for i in range(width))
    group = f"{{{names}}}" if width > 1 else names
    step = size * width
    text = f"""
.version 8.7
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 p0, .param .u64 p1)
{{
.reg .b64 %from, %to, %local; .reg .b32 %tid, %at, %other, %base;
.reg .{register_type(kind)} {names};
.shared .align 16 .b8 tile[2048]; .local .align 16 .b8 depot[32];
mov.u32 %tid, %tid.x;
ld.param.u64 %from, [p0]; ld.param.u64 %to, [p1];
mad.wide.u32 %from, %tid, {step}, %from; mad.wide.u32 %to, %tid, {step}, %to;
mov.u32 %base, tile; mad.lo.u32 %at, %tid, {step}, %base;
xor.b32 %other, %tid, 33; mad.lo.u32 %other, %other, {step}, %base;
ld.global.nc{vector}.{kind} {group}, [%from];
st.shared{vector}.{kind} [%at], {group};
bar.sync 0;
ld.shared{vector}.{kind} {group}, [%other];
mov.u64 %local, depot; cvta.local.u64 %local, %local;
st{vector}.{kind} [%local+16], {group};
ld.local{vector}.{kind} {group}, [depot+16];
st.global{vector}.{kind} [%to], {group};
ret;
}}
"""
    given = torch.randint(0, 256, (128 * step,), dtype=torch.uint8)
    out = torch.zeros_like(given)
    report = device.ptx(text, "kernel", (1,), (128,), given, out)
    assert torch.equal(out.view(128, step), given.view(128, step)[torch.arange(128) ^ 33])
    assert report.traffic(given).read == report.traffic(out).written == 128 * step
    assert report.conflict_ratio == 1.0


def test_constant_tables_and_generic_addresses() -> None:
    text = """
.version 8.7
.target sm_90
.address_size 64
.const .align 4 .b8 bytes[4] = {1, 2, 3, 250};
.global .align 4 .f32 numbers[3] = {0f3F800000, 0f40000000, 0f40400000};
.visible .entry kernel(.param .u64 p0, .param .align 8 .b8 packed[24])
{
.reg .b64 %to, %at; .reg .b32 %tid, %sum, %x, %low; .reg .f32 %f; .reg .pred %p;
.shared .align 4 .b8 tile[512];
mov.u32 %tid, %tid.x; ld.param.u64 %to, [p0]; mad.wide.u32 %to, %tid, 4, %to;
mov.u64 %at, bytes; ld.const.u8 %sum, [%at+3];
ld.param.u32 %x, [packed+16]; add.u32 %sum, %sum, %x;
mov.u64 %at, numbers; cvta.global.u64 %at, %at; ld.f32 %f, [%at+8];
cvt.rzi.u32.f32 %x, %f; add.u32 %sum, %sum, %x;
mov.u64 %at, tile; cvta.shared.u64 %at, %at; mad.wide.u32 %at, %tid, 4, %at;
st.u32 [%at], %sum; bar.sync 0;
mov.u32 %low, tile; ld.shared.u32 %sum, [%low+4];
st.global.u32 [%to], %sum;
ret;
}
"""
    out = torch.zeros(32, dtype=torch.int32)
    device.ptx(text, "kernel", (1,), (32,), out, bytes(16) + (1000).to_bytes(8, "little"))
    assert (out == 250 + 1000 + 3).all()


def test_function_calls() -> None:
    """Divergent calls of a function with parameters in memory."""
    text = """
.version 8.7
.target sm_90
.address_size 64
.func (.param .b32 result) twice(.param .b32 first, .param .b64 second)
{
.reg .b32 %x; .reg .b64 %y;
ld.param.u32 %x, [first]; ld.param.u64 %y, [second];
add.u32 %x, %x, %x; cvt.u64.u32 %y, %x; cvt.u32.u64 %x, %y;
st.param.b32 [result], %x;
ret;
}
.visible .entry kernel(.param .u64 p0)
{
.reg .b64 %to, %wide; .reg .b32 %tid, %x; .reg .pred %p;
mov.u32 %tid, %tid.x; ld.param.u64 %to, [p0]; mad.wide.u32 %to, %tid, 4, %to; mov.b64 %wide, 5;
mov.u32 %x, %tid; setp.gt.u32 %p, %tid, 20;
@%p bra $skip;
{
.param .b32 p1; .param .b64 p2; .param .b32 r1;
st.param.b32 [p1], %tid; st.param.b64 [p2], %wide;
call.uni (r1), twice, (p1, p2);
ld.param.b32 %x, [r1];
}
$skip:
shfl.sync.bfly.b32 %x, %x, 1, 31, -1;
st.global.u32 [%to], %x;
ret;
}
"""
    out = torch.zeros(32, dtype=torch.int32)
    device.ptx(text, "kernel", (1,), (32,), out)
    lane = torch.arange(32)
    value = torch.where(lane > 20, lane, 2 * lane)
    assert torch.equal(out.long(), value[lane ^ 1])


def test_unknown_instructions_are_named() -> None:
    with pytest.raises(device.Fault, match=r"frobnicate\.b32 %d, %a"):
        execute("frobnicate.b32 {d}, {a};", "b32", {"a": ("b32", samples("b32"))})

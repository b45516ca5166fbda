"""PTX instructions run one by one on the PTX machine, over samples of their types."""

from __future__ import annotations

from collections.abc import Callable

import device
import numpy as np
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


LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}

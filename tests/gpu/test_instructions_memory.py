"""Loads, stores and atomics in every space, calls, and instructions that nobody knows."""

from __future__ import annotations

import device
import numpy as np
import pytest
import torch
from instructions import LOGIC, NUMPY, execute, narrow, register_type, samples, widen


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

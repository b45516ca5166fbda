"""ldmatrix, stmatrix, mma.sync, wgmma against float64, with layouts of the ISA manual."""

from __future__ import annotations

import device
import numpy as np
import pytest
import torch

LANE = np.arange(32)
HEADER = ".version 8.7\n.target sm_90a\n.address_size 64\n"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32, "f64": torch.float64}


def names(prefix: str, n: int) -> str:
    return ", ".join(f"%{prefix}{i}" for i in range(n))


def each_lane_loads(registers: list[tuple[str, int]], pointer: str, bits: int) -> str:
    """Lane l takes element [l, i] of a [32, n] array for register i of (prefix, n) in turn."""
    lines = []
    for prefix, n in registers:
        lines.append(
            f"ld.param.u64 %at, [{pointer}]; mad.wide.u32 %at, %lane, {n * bits // 8}, %at;"
        )
        lines += [f"ld.global.b{bits} %{prefix}{i}, [%at+{i * bits // 8}];" for i in range(n)]
    return "\n".join(lines)


def packed(values: torch.Tensor, rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
    """Elements [rows, columns] (arrays [lane, element]) side by side, as bytes."""
    return values[torch.tensor(rows), torch.tensor(columns)].contiguous().view(torch.uint8)


@pytest.mark.parametrize(
    ("kind", "k", "accumulator"),
    [
        ("bf16", 16, "f32"),
        ("bf16", 8, "f32"),
        ("f16", 16, "f32"),
        ("f16", 8, "f32"),
        ("f16", 16, "f16"),
        ("tf32", 8, "f32"),
        ("tf32", 4, "f32"),
    ],
)
def test_mma(kind: str, k: int, accumulator: str) -> None:
    g, t = LANE // 4, LANE % 4
    per = 1 if kind == "tf32" else 2
    # Registers of A hold rows g and g + 8 in turn; the elements of a register are neighbours in k;
    # four lanes cover 4 * per of k.
    registers_a, registers_b = max(k * 16 // 32 // per, 1), max(k * 8 // 32 // per, 1)
    element = np.arange(registers_a * per)
    rows_a = g[:, None] + 8 * (element // per % 2)[None, :]
    columns_a = (
        t[:, None] * per + (element % per)[None, :] + (element // per // 2)[None, :] * 4 * per
    )
    element = np.arange(registers_b * per)
    rows_b = t[:, None] * per + (element % per)[None, :] + (element // per)[None, :] * 4 * per
    columns_b = np.broadcast_to(g[:, None], rows_b.shape)
    element = np.arange(4)
    rows_c, columns_c = g[:, None] + 8 * (element // 2), t[:, None] * 2 + element % 2
    torch.manual_seed(k)
    a, b = torch.randn(16, k).to(DTYPES[kind]), torch.randn(k, 8).to(DTYPES[kind])
    out_dtype = torch.float16 if accumulator == "f16" else torch.float32
    c = torch.randn(16, 8).to(out_dtype)
    n = 2 if accumulator == "f16" else 4
    text = f"""{HEADER}
.visible .entry kernel(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u64 pd)
{{
.reg .b64 %at; .reg .b32 %lane, %a<8>, %b<8>, %c<8>, %d<8>;
mov.u32 %lane, %laneid;
{each_lane_loads([("a", registers_a)], "pa", 32)}
{each_lane_loads([("b", registers_b)], "pb", 32)}
{each_lane_loads([("c", n)], "pc", 32)}
mma.sync.aligned.m16n8k{k}.row.col.{accumulator}.{kind}.{kind}.{accumulator}
    {{{names("d", n)}}}, {{{names("a", registers_a)}}},
    {{{names("b", registers_b)}}}, {{{names("c", n)}}};
ld.param.u64 %at, [pd]; mad.wide.u32 %at, %lane, {4 * n}, %at;
{" ".join(f"st.global.b32 [%at+{4 * i}], %d{i};" for i in range(n))}
ret;
}}
"""
    d = torch.empty(32, 4, dtype=out_dtype)
    device.ptx(
        text,
        "kernel",
        (1,),
        (32,),
        packed(a, rows_a, columns_a),
        packed(b, rows_b, columns_b),
        packed(c, rows_c, columns_c),
        d,
    )
    if kind == "tf32":  # the 13 low bits are ignored
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    expected = (a.double() @ b.double() + c.double())[torch.tensor(rows_c), torch.tensor(columns_c)]
    torch.testing.assert_close(
        d.double(),
        expected,
        rtol=2e-3 if accumulator == "f16" else 1e-6,
        atol=5e-3 if accumulator == "f16" else 1e-5,
    )


def test_double_precision_mma() -> None:
    g, t = LANE // 4, LANE % 4
    a, b, c = (
        torch.randn(8, 4, dtype=torch.float64),
        torch.randn(4, 8, dtype=torch.float64),
        torch.randn(8, 8, dtype=torch.float64),
    )
    rows_c, columns_c = np.broadcast_to(g[:, None], (32, 2)), t[:, None] * 2 + np.arange(2)
    text = f"""{HEADER}
.visible .entry kernel(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u64 pd)
{{
.reg .b64 %at, %a0, %b0, %c<2>, %d<2>; .reg .b32 %lane;
mov.u32 %lane, %laneid;
{each_lane_loads([("a", 1)], "pa", 64)}
{each_lane_loads([("b", 1)], "pb", 64)}
{each_lane_loads([("c", 2)], "pc", 64)}
mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {{%d0, %d1}}, {{%a0}}, {{%b0}}, {{%c0, %c1}};
ld.param.u64 %at, [pd]; mad.wide.u32 %at, %lane, 16, %at; st.global.v2.b64 [%at], {{%d0, %d1}};
ret;
}}
"""
    d = torch.empty(32, 2, dtype=torch.float64)
    fragments = (
        packed(a, g[:, None], t[:, None]),
        packed(b, t[:, None], g[:, None]),
        packed(c, rows_c, columns_c),
    )
    device.ptx(text, "kernel", (1,), (32,), *fragments, d)
    torch.testing.assert_close(d, (a @ b + c)[torch.tensor(rows_c), torch.tensor(columns_c)])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_matrix_loads_and_stores(n: int, transposed: bool) -> None:
    """Lane l gets elements (l / 4, 2 (l % 4)), .. + 1 of each matrix; stmatrix is the inverse."""
    trans = ".trans" * transposed
    group = f"{{{names('x', n)}}}"
    text = f"""{HEADER}
.visible .entry kernel(.param .u64 pin, .param .u64 pout, .param .u64 pback)
{{
.reg .b64 %at, %from; .reg .b32 %lane, %x<4>, %row, %base, %v<4>; .reg .pred %p;
.shared .align 16 .b8 tile[512]; .shared .align 16 .b8 other[512];
mov.u32 %lane, %laneid; setp.lt.u32 %p, %lane, {8 * n};
ld.param.u64 %from, [pin]; mad.wide.u32 %from, %lane, 16, %from;
mov.u32 %base, tile; mad.lo.u32 %row, %lane, 16, %base;
@%p ld.global.v4.b32 {{%v0, %v1, %v2, %v3}}, [%from];
@%p st.shared.v4.b32 [%row], {{%v0, %v1, %v2, %v3}};
bar.warp.sync -1;
ldmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 {group}, [%row];
ld.param.u64 %at, [pout]; mad.wide.u32 %at, %lane, {4 * n}, %at;
{" ".join(f"st.global.b32 [%at+{4 * i}], %x{i};" for i in range(n))}
mov.u32 %base, other; mad.lo.u32 %row, %lane, 16, %base;
stmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 [%row], {group};
bar.warp.sync -1;
ld.param.u64 %from, [pback]; mad.wide.u32 %from, %lane, 16, %from;
@%p ld.shared.v4.b32 {{%v0, %v1, %v2, %v3}}, [%row];
@%p st.global.v4.b32 [%from], {{%v0, %v1, %v2, %v3}};
ret;
}}
"""
    matrices = torch.arange(n * 64, dtype=torch.int16).view(n, 8, 8)
    out, back = torch.empty(32, n, 2, dtype=torch.int16), torch.empty_like(matrices)
    device.ptx(text, "kernel", (1,), (32,), matrices, out, back)
    source = matrices.mT if transposed else matrices
    expected = source.reshape(n, 32, 2).transpose(0, 1)
    assert torch.equal(out, expected)
    assert torch.equal(back, matrices)


# ---- wgmma

SWIZZLES = {0: 16, 3: 32, 2: 64, 1: 128}  # mode: bytes of a swizzled row


def tile_image(values: torch.Tensor, mn_major: bool, mode: int) -> tuple[torch.Tensor, int, int]:
    """A [MN, K] operand in the canonical layout: bytes, leading and stride byte offsets."""
    rows, k = values.shape
    size = values.element_size()
    width = SWIZZLES[mode]
    mn, kk = np.meshgrid(np.arange(rows), np.arange(k), indexing="ij")
    if mn_major:
        along, across, extent = mn * size, kk, rows * size
    else:
        along, across, extent = kk * size, mn, k * size
    groups = (max(k, 8) if mn_major else rows) // 8  # of 8 rows of `width` bytes
    atom = 8 * width
    if (
        mode == 0 and not mn_major
    ):  # core matrices: K neighbours `leading` apart, groups of 8 rows `stride` apart
        leading, stride = atom * groups, atom
        at = along // 16 * leading + across // 8 * stride + across % 8 * 16 + along % 16
    elif mode == 0:
        leading, stride = atom, atom * groups
        at = along // 16 * stride + across // 8 * leading + across % 8 * 16 + along % 16
    else:
        stride, leading = atom, atom * groups
        at = along // width * leading + across // 8 * stride + across % 8 * width + along % width
    at = at ^ ((at >> 7 & (width // 16 - 1)) << 4)
    image = torch.zeros(int(-(-extent // width) * atom * groups), dtype=torch.uint8)
    source = values.contiguous().view(torch.uint8).view(rows, k, size).numpy()
    for byte in range(size):
        image.numpy()[at + byte] = source[:, :, byte]
    return image, leading, stride


def descriptor(leading: int, stride: int, mode: int) -> int:
    return leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def wgmma_text(
    kind: str,
    n: int,
    a_bytes: int,
    b_bytes: int,
    a_descriptor: int | None,
    b_descriptor: int,
    trans: tuple[int, int],
) -> str:
    """out [128, n / 2] = two equal products, summed; without a_descriptor A is in registers."""
    k = 8 if kind == "tf32" else 16
    flags = (
        ""
        if kind == "tf32"
        else f", {trans[0]}, {trans[1]}"
        if a_descriptor is not None
        else f", {trans[1]}"
    )
    if a_descriptor is None:
        a_operand = "{%a0, %a1, %a2, %a3}"
        load_a = "ld.param.u64 %at, [pa]; mad.wide.u32 %at, %tid, 16, %at;\n"
        load_a += "ld.global.v4.b32 {%a0, %a1, %a2, %a3}, [%at];"
        a_bytes = 0
    else:
        a_operand, load_a = "%da", ""
    total = a_bytes + b_bytes
    product = f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind} "
    product += f"{{{names('d', n // 2)}}}, {a_operand}, %db"

    def copy(pointer: str, to: int, size: int) -> str:
        return f"""
ld.param.u64 %at, [{pointer}]; mul.wide.u32 %offset, %tid, 16; add.s64 %at, %at, %offset;
mul.lo.u32 %to, %tid, 16; add.u32 %to, %to, %base;
mov.u32 %i, %tid;
$copy_{pointer}: setp.ge.u32 %p, %i, {size // 16};
@%p bra $done_{pointer};
ld.global.v4.b32 {{%v0, %v1, %v2, %v3}}, [%at];
st.shared.v4.b32 [%to+{to}], {{%v0, %v1, %v2, %v3}};
add.s64 %at, %at, 2048; add.u32 %to, %to, 2048; add.u32 %i, %i, 128;
bra $copy_{pointer};
$done_{pointer}:"""

    return f"""{HEADER}
.visible .entry kernel(.param .u64 pa, .param .u64 pb, .param .u64 pd)
{{
.reg .b64 %at, %offset, %da, %db; .reg .b32 %tid, %to, %base, %i, %v<4>, %a<4>, %d<128>;
.reg .pred %p, %one, %zero;
.shared .align 1024 .b8 tiles[{total}];
mov.u32 %tid, %tid.x; mov.u32 %base, tiles;
setp.eq.u32 %one, 1, 1; setp.eq.u32 %zero, 0, 1;
{load_a}
{copy("pa", 0, a_bytes) if a_bytes else ""}
{copy("pb", a_bytes, b_bytes)}
fence.proxy.async.shared::cta;
bar.sync 0;
cvt.u64.u32 %da, %base; shr.u64 %da, %da, 4; mov.b64 %db, %da;
or.b64 %da, %da, {a_descriptor or 0}; add.s64 %db, %db, {a_bytes >> 4};
or.b64 %db, %db, {b_descriptor};
wgmma.fence.sync.aligned;
{product}, %zero, 1, 1{flags};
{product}, %one, 1, 1{flags};
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
ld.param.u64 %at, [pd]; mad.wide.u32 %at, %tid, {2 * n}, %at;
{" ".join(f"st.global.b32 [%at+{4 * i}], %d{i};" for i in range(n // 2))}
ret;
}}
"""


CASES = [
    (kind, source, a_major, b_major, mode)
    for kind in ("bf16", "f16")
    for source, a_major in (("registers", "k"), ("shared", "k"), ("shared", "mn"))
    for b_major in ("k", "mn")
    for mode in SWIZZLES
] + [("tf32", source, "k", "k", mode) for source in ("registers", "shared") for mode in SWIZZLES]


def wgmma_case(
    kind: str, source: str, a_major: str, b_major: str, mode: int
) -> tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]:
    """PTX, both operands as it takes them, and the expected [64, n] result."""
    torch.manual_seed(mode)
    n, k = 128, 8 if kind == "tf32" else 16
    a, b = torch.randn(64, k).to(DTYPES[kind]), torch.randn(n, k).to(DTYPES[kind])
    if source == "registers":
        lane, warp = LANE, np.arange(4)
        per = 1 if kind == "tf32" else 2
        element = np.arange(4 * per)
        rows = 16 * warp[:, None, None] + (lane // 4)[None, :, None] + 8 * (element // per % 2)
        columns = (lane % 4)[None, :, None] * per + element % per + (element // per // 2) * 4 * per
        a_given = packed(
            a, rows.reshape(128, -1), np.broadcast_to(columns, rows.shape).reshape(128, -1)
        )
        a_descriptor = None
    else:
        a_given, leading, stride = tile_image(a, a_major == "mn", mode)
        a_descriptor = descriptor(leading, stride, mode)
    b_given, leading, stride = tile_image(b, b_major == "mn", mode)
    trans = int(a_major == "mn"), int(b_major == "mn")
    a_bytes = -(-a_given.numel() // 1024) * 1024 if a_descriptor is not None else a_given.numel()
    padded = torch.zeros(a_bytes, dtype=torch.uint8)
    padded[: a_given.numel()] = a_given.reshape(-1)
    text = wgmma_text(
        kind, n, a_bytes, b_given.numel(), a_descriptor, descriptor(leading, stride, mode), trans
    )
    if kind == "tf32":
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    return text, padded, b_given, 2 * a.double() @ b.double().T


def unpacked(d: torch.Tensor) -> torch.Tensor:
    """[128, n / 2] registers to [64, n]."""
    n = 2 * d.shape[1]
    out = torch.empty(64, n)
    thread, i = np.meshgrid(np.arange(128), np.arange(n // 2), indexing="ij")
    rows = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
    columns = 8 * (i // 4) + thread % 4 * 2 + i % 2
    out[torch.tensor(rows), torch.tensor(columns)] = d
    return out


@pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, c)) for c in CASES])
def test_wgmma(case: tuple[str, str, str, str, int]) -> None:
    text, a, b, expected = wgmma_case(*case)
    d = torch.empty(128, 64)
    device.ptx(text, "kernel", (1,), (128,), a, b, d, seed=case[-1])
    torch.testing.assert_close(unpacked(d).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("source", ["registers", "shared"])
def test_wgmma_synchronisation_is_needed(source: str) -> None:
    text, a, b, _ = wgmma_case("bf16", source, "k", "k", 1)
    # The fence matters where a register was written before it.
    text = text.replace("wgmma.fence", "mov.b32 %d0, %tid; add.u32 %d0, %d0, 1;\nwgmma.fence")
    changes = list(device.mutants(text, "kernel"))
    assert len(changes) == 5
    device.ptx(text, "kernel", (1,), (128,), a, b, torch.empty(128, 64))
    kinds = {}
    for change, mutant in changes:
        with pytest.raises(device.Fault) as caught:
            device.ptx(mutant, "kernel", (1,), (128,), a, b, torch.empty(128, 64))
        kinds[change.split(".")[0] + "." + change.split(".")[1]] = caught.value.kind
    assert (
        kinds["wgmma.fence"] == kinds["wgmma.commit_group"] == kinds["wgmma.wait_group"] == "wgmma"
    )
    assert kinds["fence.proxy"] == "proxy" and kinds["bar.sync 0;"] in ("race", "uninitialised")


def test_tile_may_not_be_overwritten_under_wgmma() -> None:
    text, a, b, _ = wgmma_case("bf16", "shared", "k", "k", 1)
    overwrite = "st.shared.v4.b32 [%base], {%v0, %v1, %v2, %v3};\n"
    wait = "wgmma.wait_group.sync.aligned 0;\n"
    late = text.replace(wait, "bar.sync 0;\n" + overwrite + wait)
    with pytest.raises(device.Fault) as caught:
        device.ptx(late, "kernel", (1,), (128,), a, b, torch.empty(128, 64))
    assert caught.value.kind == "in-flight"

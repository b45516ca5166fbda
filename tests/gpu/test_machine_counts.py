"""What the PTX machine counts and knows: traffic, bank conflicts, tensors' ends, schedules."""

from __future__ import annotations

import ctypes

import device
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

COPY = """
.version 8.7
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 px, .param .u64 py, .param .u32 step)
{
.reg .b64 %x, %y; .reg .b32 %i, %at, %step, %v;
mov.u32 %i, %tid.x; ld.param.u64 %x, [px]; ld.param.u64 %y, [py]; ld.param.u32 %step, [step];
mul.lo.u32 %at, %i, %step;
mad.wide.u32 %x, %at, 4, %x; mad.wide.u32 %y, %i, 4, %y;
ld.global.u32 %v, [%x]; st.global.u32 [%y], %v;
ret;
}
"""


@pytest.mark.parametrize(
    ("step", "sectors", "lines"), [(1, 8, 2), (2, 16, 4), (8, 64, 16), (32, 64, 64), (0, 2, 2)]
)
def test_global_traffic(step: int, sectors: int, lines: int) -> None:
    x, y = torch.arange(64 * 32, dtype=torch.int32), torch.empty(64, dtype=torch.int32)
    report = device.ptx(COPY, "kernel", (1,), (64,), x, y, step)
    t = report.traffic(x)
    assert t.read == (256 if step else 8) and t.read_unique == (256 if step else 4)
    assert t.read_sectors == 32 * sectors and t.read_lines == lines
    assert t.partial_read_lines == (0 if step == 1 else lines)
    written = report.traffic(y)
    assert (
        written.written,
        written.written_sectors,
        written.written_lines,
        written.partial_written_lines,
    ) == (256, 256, 2, 0)
    assert report.instructions["ld.global.u32"] == 2 and report.count("st.") == 2


@pytest.mark.parametrize(
    ("stride", "bytes", "ratio"),
    [
        (4, 4, 1),
        (8, 4, 2),
        (128, 4, 32),
        (132, 4, 1),
        (0, 4, 1),
        (8, 8, 1),
        (16, 16, 1),
        (32, 16, 2),
        (144, 16, 1),
        (128, 16, 8),
    ],
)
def test_bank_conflicts(stride: int, bytes: int, ratio: int) -> None:
    vector = {4: "", 8: ".v2", 16: ".v4"}[bytes]
    group = {4: "%v0", 8: "{%v0, %v1}", 16: "{%v0, %v1, %v2, %v3}"}[bytes]
    text = f"""
.version 8.7
.target sm_80
.address_size 64
.visible .entry kernel()
{{
.reg .b32 %i, %at, %v<4>; .extern_placeholder;
mov.u32 %i, %tid.x; mov.u32 %at, tile; mad.lo.u32 %at, %i, {stride}, %at;
mov.u32 %v0, 0; mov.u32 %v1, 0; mov.u32 %v2, 0; mov.u32 %v3, 0;
st.shared{vector}.b32 [%at], {group};
ret;
}}
""".replace(" .extern_placeholder;", " .shared .align 16 .b8 tile[4608];")
    report = device.ptx(text, "kernel", (1,), (32,))
    assert report.conflict_ratio == ratio


@triton.jit
def overlapping(y, BLOCK: tl.constexpr):
    tl.store(y + tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK), 1.0)


def test_reports_add_up() -> None:
    with device.simulate() as run:
        y = torch.empty(64)
        for _ in range(3):
            overlapping[(1,)](y, BLOCK=64)
    assert len(run.launches) == 3
    assert run.total().traffic(y).written == 3 * 256 and run.total("other").traffic().written == 0


def test_fresh_tensors_are_poisoned_and_exact() -> None:
    with device.arena():
        assert (
            torch.empty(1000).isnan().all() and torch.empty(10, dtype=torch.bfloat16).isnan().all()
        )
        x, y = torch.zeros(63, dtype=torch.int32), torch.empty(64, dtype=torch.int32)
        with pytest.raises(device.Fault, match="252 bytes into a tensor of 252"):
            device.ptx(COPY, "kernel", (1,), (64,), x, y, 1)


def test_tensors_made_elsewhere_are_known_by_their_storage() -> None:
    numpy = pytest.importorskip("numpy")
    x, y = (
        torch.from_numpy(numpy.arange(64, dtype=numpy.int32)),
        torch.from_numpy(numpy.zeros(64, numpy.int32)),
    )
    device.ptx(COPY, "kernel", (1,), (64,), x, y, 1)
    assert torch.equal(x, y)


def test_foreign_pointers_are_refused() -> None:
    y = torch.empty(64, dtype=torch.int32)
    elsewhere = ctypes.create_string_buffer(1024)
    with pytest.raises(device.Fault) as caught:
        device.ptx(COPY, "kernel", (1,), (64,), ctypes.addressof(elsewhere), y, 1)
    assert caught.value.kind == "bounds"


@triton.jit
def ticket(counter, order):
    tl.store(order + tl.program_id(0), tl.atomic_add(counter, 1))


def test_seed_draws_the_schedule() -> None:
    def order(seed: int) -> list[int]:
        with device.arena():
            counter, out = torch.zeros(1, dtype=torch.int32), torch.empty(32, dtype=torch.int32)
        device.triton(ticket, (32,), counter, out, seed=seed)
        return out.tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(3)) == list(range(32))


def test_two_programs_on_one_element_are_found() -> None:
    with pytest.raises(device.Fault) as caught:
        device.triton(overlapping, (2,), torch.empty(128), BLOCK=64)
    assert caught.value.kind == "race"

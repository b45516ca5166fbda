"""What the lanes of a warp do together: exchange, votes, divergence."""

from __future__ import annotations

import numpy as np
from instructions import LOGIC, N, execute, samples


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

"""An adapter per row: rows in the order of their adapters, and runs of them of one adapter each.

A *place* is a position in that order. Adapter n's rows are group n; group N are those for which the
index names none. Two launches: entries of the index are counted, then they are placed, and runs are
found. Nothing is read that would be waited for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import architecture

BLOCK_E = 64
BLOCK_ROWS = 32
BLOCK_RUNS = 8
BLOCK_N = 64


class Runs(NamedTuple):
    """Runs of places: as many as there can be, those that are not needed are empty."""

    table: Tensor | None = None
    """[runs, 3]: the adapter, -1 where the index names none; the first place; that behind"""
    firsts: Tensor | None = None
    """[N + 2]: which run is the first of each group, and how many there are"""


class Groups(NamedTuple):
    """By default there is one adapter, whose parameters are no stack."""

    adapters: int = 1
    order: Tensor | None = None
    """[M]: the row at each place; the rows of an adapter follow one another as they do in x"""
    tiles: Runs = Runs()
    splits: Runs = Runs()


@triton.jit
def groups_of(index, entries, count, adapters):
    """The groups of entries of the index; -1 beyond its end."""
    inside = entries < count
    named = tl.load(index + entries, mask=inside, other=0)
    group = tl.where((named >= 0) & (named < adapters), named, adapters)
    return tl.where(inside, group, -1).to(tl.int32)


@triton.jit(do_not_specialize=["count", "adapters"])
def count_kernel(
    counts, index, count, adapters, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """How many entries each block of BLOCK_E has of each group: [blocks, N + 1]."""
    entries = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = groups_of(index, entries, count, adapters)
    counted = tl.sum((own[:, None] == n[None, :]).to(tl.int32), 0)
    tl.store(counts + tl.program_id(0) * (adapters + 1) + n, counted, mask=n <= adapters)


@triton.jit
def counted(counts, n, block, count, adapters, BLOCK_E: tl.constexpr):
    """How many entries there are of groups ``n``, and how many of them before a block."""
    all_of_them = tl.zeros(n.shape, count.dtype)
    earlier = tl.zeros(n.shape, count.dtype)
    blocks = tl.cdiv(count, BLOCK_E)
    for start in range(0, blocks, 32):
        b = start + tl.arange(0, 32)
        found = tl.load(
            counts + b[:, None] * (adapters + 1) + n[None, :],
            mask=(b < blocks)[:, None] & (n <= adapters)[None, :],
            other=0,
        )
        all_of_them += tl.sum(found, 0)
        earlier += tl.sum(tl.where((b < block)[:, None], found, 0), 0)
    return all_of_them, earlier


@triton.jit
def place_rows(
    order,
    counts,
    index,
    count,
    rows_each,
    adapters,
    BLOCK_E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_ROWS of the rows of each of BLOCK_E entries."""
    chunks = tl.cdiv(rows_each, BLOCK_ROWS)
    block = tl.program_id(0) // chunks
    entries = block * BLOCK_E + tl.arange(0, BLOCK_E)
    own = groups_of(index, entries, count, adapters)
    places = tl.zeros([BLOCK_E], count.dtype)
    before = count * 0
    for start in range(0, adapters + 1, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        total, earlier = counted(counts, n, block, count, adapters, BLOCK_E)
        begins = before + tl.cumsum(total, 0) - total + earlier
        same = own[:, None] == n[None, :]
        behind = tl.cumsum(same.to(tl.int32), 0)
        places += tl.sum(tl.where(same, begins[None, :] + behind - 1, 0), 1)
        before += tl.sum(total, 0)
    rows = tl.program_id(0) % chunks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = (entries < count)[:, None] & (rows < rows_each)[None, :]
    to = places.to(tl.int64)[:, None] * rows_each + rows[None, :]
    tl.store(order + to, entries.to(tl.int64)[:, None] * rows_each + rows[None, :], mask=inside)


@triton.jit
def find_runs(
    table,
    firsts,
    runs,
    length,
    counts,
    count,
    rows_each,
    adapters,
    BLOCK_E: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_RUNS of the runs, of up to ``length`` places."""
    run = tl.program_id(0) * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
    adapter = tl.full([BLOCK_RUNS], -1, tl.int64)
    begin = tl.zeros([BLOCK_RUNS], tl.int64)
    end = tl.zeros([BLOCK_RUNS], tl.int64)
    place = tl.full([], 0, tl.int64)
    before = tl.full([], 0, tl.int64)
    for start in range(0, adapters + 2, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        total, _ = counted(counts, n, 0, count, adapters, BLOCK_E)
        total = total.to(tl.int64) * rows_each
        own = (total + length - 1) // length
        ends = place + tl.cumsum(total, 0)
        behind = before + tl.cumsum(own, 0)
        first = behind - own
        if tl.program_id(0) == 0:
            tl.store(firsts + n, first, mask=n < adapters + 2)
        holds = (first[None, :] <= run[:, None]) & (run[:, None] < behind[None, :])
        begins = (ends - total)[None, :] + (run[:, None] - first[None, :]) * length
        known = holds & (n < adapters)[None, :]
        adapter += tl.sum(tl.where(known, n[None, :] + 1, 0), 1)
        begin += tl.sum(tl.where(holds, begins, 0), 1)
        end += tl.sum(tl.where(holds, tl.minimum(begins + length, ends[None, :]), 0), 1)
        place += tl.sum(total, 0)
        before += tl.sum(own, 0)
    tl.store(table + 3 * run, adapter, mask=run < runs)
    tl.store(table + 3 * run + 1, begin, mask=run < runs)
    tl.store(table + 3 * run + 2, end, mask=run < runs)


@triton.jit(
    do_not_specialize=["count", "rows_each", "adapters", "tiles", "block_m", "splits", "per_split"]
)
def groups_kernel(
    order,
    tiles_table,
    tiles_firsts,
    splits_table,
    splits_firsts,
    counts,
    index,
    count,
    rows_each,
    adapters,
    tiles,
    block_m,
    splits,
    per_split,
    BLOCK_E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The order of the rows, and by the second axis of the grid tiles and splits of them.

    index [count]: of items of rows_each rows each.
    """
    if tl.program_id(1) == 0:
        place_rows(
            order, counts, index, count, rows_each, adapters, BLOCK_E, BLOCK_ROWS, BLOCK_N
        )  # fmt: skip
    elif tl.program_id(1) == 1:
        find_runs(
            tiles_table, tiles_firsts, tiles, block_m, counts, count, rows_each, adapters, BLOCK_E,
            BLOCK_RUNS, BLOCK_N,
        )  # fmt: skip
    elif splits_table is not None:
        find_runs(
            splits_table, splits_firsts, splits, per_split, counts, count, rows_each, adapters,
            BLOCK_E, BLOCK_RUNS, BLOCK_N,
        )  # fmt: skip


def make_groups(
    index: Tensor, adapters: int, m: int, block_m: int, rows_per_split: int = 0
) -> Groups:
    """Of M rows, so many for each entry of the index.

    Tiles are of up to block_m rows; there are no splits of 0.
    """
    count, device = index.numel(), index.device
    rows_each = m // count
    dtype = torch.int32 if m < 2**31 else torch.int64

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def runs(length: int) -> Runs:
        if length == 0:
            return Runs()
        # Each group may end in a run that is not full.
        return Runs(empty(m // length + min(adapters + 1, count), 3), empty(adapters + 2))

    groups = Groups(adapters, empty(m), runs(block_m), runs(rows_per_split))
    tiles, splits = (0 if r.table is None else len(r.table) for r in groups[2:])
    blocks = triton.cdiv(count, BLOCK_E)
    counts = torch.empty(blocks, adapters + 1, dtype=torch.int32, device=device)
    count_kernel[blocks, triton.cdiv(adapters + 1, BLOCK_N)](
        counts, index, count, adapters, BLOCK_E=BLOCK_E, BLOCK_N=BLOCK_N
    )
    programs = blocks * triton.cdiv(rows_each, BLOCK_ROWS), triton.cdiv(tiles, BLOCK_RUNS)
    groups_kernel[max(programs), 3 if splits else 2](
        groups.order,
        *groups.tiles,
        *groups.splits,
        counts,
        index,
        count,
        rows_each,
        adapters,
        tiles,
        block_m,
        splits,
        rows_per_split,
        BLOCK_E=BLOCK_E,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_RUNS=BLOCK_RUNS,
        BLOCK_N=BLOCK_N,
        # All there are: beside some versions of Triton ptxas by itself keeps fewer, and spills.
        **({} if architecture().startswith("gfx") else {"maxnreg": 255}),
    )
    return groups


@triton.jit
def load_run(table, run, M):
    """The adapter, or -1, the first place and the one behind, of M."""
    entry = table + run.to(tl.int64) * 3
    adapter, begin, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    return adapter.to(tl.int64), begin.to(M.dtype), end.to(M.dtype)

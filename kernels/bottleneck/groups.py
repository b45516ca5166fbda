"""An adapter per row: rows in the order of their adapters, and runs of them of one adapter each.

A *place* is a position in that order. Beside the adapters 0 to N - 1 the index may name none, by
what is negative or beyond: with these two there are N + 2 groups of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_RUNS = 8
BLOCK_N = 256


class Runs(NamedTuple):
    """Runs of places: as many as there can be, those that are not needed are empty."""

    table: Tensor | None = None
    """[runs, 3]: the adapter, -1 where the index names none; the first place; that behind"""
    firsts: Tensor | None = None
    """[N + 3]: which run is the first of each group, and how many there are"""


class Groups(NamedTuple):
    """By default there is one adapter, whose parameters are no stack."""

    adapters: int = 1
    order: Tensor | None = None
    """[M]: the row at each place; the rows of an adapter follow one another as they do in x"""
    tiles: Runs = Runs()
    splits: Runs = Runs()


@triton.jit
def count_below(keys, n, count):
    """How many of the sorted keys [count] are less than each of ``n``."""
    below = tl.zeros(n.shape, tl.int64)
    span = count
    while span > 1:
        half = span // 2
        below += tl.where(tl.load(keys + below + half - 1) < n, half, 0)
        span -= half
    return below + (tl.load(keys + below) < n).to(tl.int64)


@triton.jit
def write_runs(
    table,
    firsts,
    keys,
    count,
    rows_each,
    groups,
    length,
    runs,
    BLOCK_RUNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_RUNS of the runs, of up to ``length`` places; their first places, and those behind."""
    run = tl.program_id(0) * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
    group = tl.zeros([BLOCK_RUNS], tl.int64)
    begin = tl.zeros([BLOCK_RUNS], tl.int64)
    end = tl.zeros([BLOCK_RUNS], tl.int64)
    before = tl.full([], 0, tl.int64)
    for start in range(0, groups + 1, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        begins = count_below(keys, n - 1, count) * rows_each
        ends = count_below(keys, n, count) * rows_each
        own = (ends - begins + length - 1) // length
        behind = before + tl.cumsum(own, 0)
        first = behind - own
        if tl.program_id(0) == 0:
            tl.store(firsts + n, first, mask=n <= groups)
        holds = (first[None, :] <= run[:, None]) & (run[:, None] < behind[None, :])
        places = begins[None, :] + (run[:, None] - first[None, :]) * length
        group += tl.sum(tl.where(holds, n[None, :], 0), 1)
        begin += tl.sum(tl.where(holds, places, 0), 1)
        end += tl.sum(tl.where(holds, tl.minimum(places + length, ends[None, :]), 0), 1)
        before += tl.sum(own, 0)
    tl.store(table + 3 * run, tl.where(group < groups - 1, group - 1, -1), mask=run < runs)
    tl.store(table + 3 * run + 1, begin, mask=run < runs)
    tl.store(table + 3 * run + 2, end, mask=run < runs)
    return begin, end


@triton.jit(
    do_not_specialize=["count", "rows_each", "groups", "tiles", "rows_per_split", "splits"]
)
def groups_kernel(
    order,
    tiles_table,
    tiles_firsts,
    splits_table,
    splits_firsts,
    keys,
    items,
    count,
    rows_each,
    groups,
    tiles,
    rows_per_split,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The order of rows, tiles of BLOCK_M of them, and if there is a table for them the splits.

    keys, items [count]: sorted adapters of the items, and which items these are, of rows_each rows.
    """
    begin, end = write_runs(
        tiles_table, tiles_firsts, keys, count, rows_each, groups, BLOCK_M, tiles, BLOCK_RUNS,
        BLOCK_N,
    )  # fmt: skip
    places = begin[:, None] + tl.arange(0, BLOCK_M)[None, :]
    inside = places < end[:, None]
    item = tl.load(items + places // rows_each, mask=inside, other=0)
    tl.store(order + places, item * rows_each + places % rows_each, mask=inside)
    if splits_table is not None:
        write_runs(
            splits_table, splits_firsts, keys, count, rows_each, groups, rows_per_split, splits,
            BLOCK_RUNS, BLOCK_N,
        )  # fmt: skip


def make_groups(
    index: Tensor, adapters: int, m: int, block_m: int, rows_per_split: int = 0
) -> Groups:
    """Of M rows, so many for each entry of the index; nothing is read that would be waited for.

    Tiles are of up to block_m rows; there are no splits of 0.
    """
    count, device = index.numel(), index.device
    # A radix sort passes over each byte of a key.
    narrow = torch.int16 if adapters < 2**15 - 1 else torch.int64
    keys, items = index.reshape(-1).clamp(-1, adapters).to(narrow).sort(stable=True)
    dtype = torch.int32 if m < 2**31 else torch.int64
    order = torch.empty(m, dtype=dtype, device=device)
    # Each group may end in a run that is not full.
    lengths = (block_m, rows_per_split or m)
    tiles, splits = (m // length + min(adapters + 2, count) for length in lengths)

    def runs(most: int) -> Runs:
        table = torch.empty(most, 3, dtype=dtype, device=device)
        return Runs(table, torch.empty(adapters + 3, dtype=dtype, device=device))

    groups = Groups(adapters, order, runs(tiles), runs(splits) if rows_per_split else Runs())
    groups_kernel[(triton.cdiv(max(tiles, splits), BLOCK_RUNS),)](
        order,
        *groups.tiles,
        *groups.splits,
        keys,
        items,
        count,
        m // count,
        adapters + 2,
        tiles,
        rows_per_split,
        splits,
        BLOCK_M=block_m,
        BLOCK_RUNS=BLOCK_RUNS,
        BLOCK_N=BLOCK_N,
    )
    return groups


@triton.jit
def load_run(table, run, M):
    """The adapter, or -1, the first place and the one behind, of M."""
    entry = table + run.to(tl.int64) * 3
    adapter, begin, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    return adapter.to(tl.int64), begin.to(M.dtype), end.to(M.dtype)

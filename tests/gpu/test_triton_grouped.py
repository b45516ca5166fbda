"""Adapters per item on the Triton kernels as compiled for sm_80 and sm_90, on the PTX machine."""

from __future__ import annotations

from dataclasses import replace

import bottleneck_cases
import device
import grouped_cases
import pytest
import torch
from bottleneck_cases import Case
from grouped_cases import ADAPTERS, index_of
from schedules import same_under_schedules

from fastadapters import backends

pytest.importorskip("triton")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine runs kernels on CPU tensors, which the backend itself refuses."""
    monkeypatch.setattr(backends, "_why_not", lambda *args: None)


EVERYTHING = Case(
    rows=(5, 40), d_out=136, dtype=BF16, activation="gelu", norm="both", scale="channel",
    residual="other", dropout=0.3, input_dropout=0.2,
)  # fmt: skip
CASES = [
    (
        Case(rows=(2, 3, 30), dtype=FP16, dropout=0.2, scale="learnable", layout="slice"),
        2,
        80,
    ),
    (Case(rows=(3, 70), dtype=BF16, activation="gelu", norm="both", dropout=0.3), 2, 80),
    (Case(rows=(5, 40), dtype=FP32, norm="both", activation="silu", scale="channel"), 1, 80),
    (Case(rows=(4, 40), d=200, r=300, dtype=BF16, activation="silu", residual="none"), 2, 80),
    (replace(EVERYTHING, x_dtype=FP32, param_dtype=FP32, residual_dtype=FP32), 2, 80),
    (Case(rows=(3, 70), d=130, r=33, dtype=BF16, activation="silu", norm="both"), 2, 90),
    (EVERYTHING, 1, 90),
]


@pytest.mark.parametrize(("case", "dims", "arch"), CASES, ids=str)
def test_matches_reference(case: Case, dims: int, arch: int) -> None:
    index = index_of(case, dims)
    out = same_under_schedules(
        str(case),
        arch,
        lambda: grouped_cases.check_backend(case, index, "triton"),
        lambda: grouped_cases.run(case, grouped_cases.inputs(case), index, "triton"),
    )
    for name, t in out.items():
        if name not in ("y", "d_x", "d_residual"):
            occurs = [bool((index == n).any()) for n in range(ADAPTERS)]
            assert [bool((g != 0).any()) for g in t] == occurs and not occurs[1], name


def launched(run: device.Simulation) -> list[str]:
    return [report.name.removesuffix("_kernel") for report in run.launches]


STEP = "count groups norm forward count groups norm backward weights reduce"


def test_as_many_launches_whatever_the_number_of_adapters() -> None:
    case = Case(rows=(6, 20), d=32, r=8, dtype=BF16, norm="both")
    for adapters in (1, 9):
        index = index_of(case, adapters=adapters)
        with device.simulate(80) as run:
            grouped_cases.run(case, grouped_cases.inputs(case, adapters), index, "triton")
        assert launched(run) == STEP.split()


@pytest.mark.parametrize("arch", [80, 90], ids="sm_{}".format)
def test_traffic_is_that_of_one_adapter(arch: int) -> None:
    """x, y and their gradients, whole lines; each tile reads the weights of its adapter alone."""
    case = Case(rows=(256,), d=768, r=64, dtype=BF16, activation="gelu")
    index = torch.tensor([3, 0, 2, 3] * 64)  # 2, 2 and 4 tiles of at most 64 rows, unsorted
    tensors = {name: t.clone() for name, t in grouped_cases.inputs(case).items()}
    with device.simulate(arch) as run:
        t = tensors | grouped_cases.run(case, tensors, index, "triton")
    assert launched(run) == STEP.replace("norm ", "").split()
    unit = t["x"].nbytes
    forward, backward, weights = (
        run.total(f"{n}_kernel") for n in ("forward", "backward", "weights")
    )
    moved = forward.traffic(t["x"])
    assert moved.read == moved.read_sectors == 2 * unit and moved.partial_read_lines == 0
    moved = backward.traffic(t["cotangent"])
    assert moved.read == moved.read_sectors == 2 * unit and moved.partial_read_lines == 0
    for kernel, name in ((forward, "y"), (backward, "d_x")):
        moved = kernel.traffic(t[name])
        assert moved.written == moved.written_sectors == unit
        assert moved.partial_written_lines == 0, name
    assert backward.traffic(t["x"]).read == 0
    assert weights.traffic(t["x"]).read == weights.traffic(t["cotangent"]).read == unit
    one = t["down_weight"].nbytes // ADAPTERS
    rows = 64 if arch == 80 else 128
    tiles = sum(-(-int((index == n).sum()) // rows) for n in range(ADAPTERS))
    assert forward.traffic(t["down_weight"]).read == tiles * one
    assert forward.traffic(t["up_weight"]).read == tiles * one
    assert max(forward.conflict_ratio, backward.conflict_ratio) == 1.0
    matrix = "wgmma" if arch == 90 else "mma.sync"
    assert all(kernel.count(matrix) > 0 for kernel in (forward, backward, weights))


def test_many_rows_of_an_adapter_are_split() -> None:
    """Several partial sums of one adapter: the bottleneck on its rows, but for the last bit."""
    case = Case(rows=(600,), d=96, r=16, dtype=BF16, norm="both", scale="learnable", dropout=0.3)
    tensors = grouped_cases.inputs(case)
    index = torch.full((600,), 2)
    with device.simulate(80) as run:
        out = grouped_cases.run(case, tensors, index, "triton")
        own = {n: t if n in ("x", "cotangent") else t[2] for n, t in tensors.items()}
        own["scale"] = own["scale"].reshape(1)
        alone = bottleneck_cases.run(case, own, "triton")
    grouped, single = (r for r in run.launches if r.name == "weights_kernel")
    assert single.grid[2] > 1 and grouped.grid[2] > single.grid[2]
    for name, t in alone.items():
        found = out[name] if name in ("y", "d_x") else out[name][2]
        torch.testing.assert_close(found.reshape(t.shape), t)

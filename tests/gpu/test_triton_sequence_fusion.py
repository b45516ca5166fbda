"""Sequence fusion in Triton as compiled for sm_80 and sm_90, run on the PTX machine."""

from __future__ import annotations

import device
import pytest
import sequence_fusion_cases as cases
import torch
from schedules import missed, same_under_schedules
from sequence_fusion_cases import Case
from torch import Tensor

from fastadapters import backends

pytest.importorskip("triton")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHITECTURES = pytest.mark.parametrize("arch", [80, 90], ids="sm_{}".format)


@pytest.fixture(autouse=True)
def on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine runs kernels on CPU tensors, which the backend itself refuses."""
    monkeypatch.setattr(backends, "_why_not", lambda *args: None)


def check_schedules(case: Case, arch: int) -> dict[str, Tensor]:
    return same_under_schedules(
        str(case),
        arch,
        lambda: cases.check_backend(case, "triton"),
        lambda: cases.run(case, cases.inputs(case), "triton"),
    )


# Every option in bf16; the other dtypes and sizes where the code they compile to differs. With relu
# a rounding can turn the gradient of an element on or off, which no tolerance covers.
OPTIONS = cases.option_cases(dtype=BF16)[:6]
OTHERS = [
    Case(dtype=FP16, rank=2, lengths=True, residual="leading"),
    Case(dtype=FP32, rank=2, feature_rank=3),
    *cases.mixed_cases(BF16)[:2],
    Case(tokens=(90, 3), dims=(200, 72), widths=(70, 7), out_len=20, dim=72, dtype=BF16),
]


@pytest.mark.parametrize("case", [*OPTIONS, *OTHERS], ids=str)
def test_matches_reference(case: Case) -> None:
    check_schedules(case, 80)


# On Hopper the products differ.
@pytest.mark.parametrize("case", [OPTIONS[3], *OTHERS[1:4:2], OTHERS[4]], ids=str)
def test_matches_reference_on_hopper(case: Case) -> None:
    check_schedules(case, 90)


@pytest.mark.parametrize(
    ("wanted", "ran"),
    [
        ("", "combine fuse"),
        ("x 1", "combine fuse factors tokens inputs"),
        ("time_factor 0", "combine fuse factors tokens reduce"),
        ("feature_factor 2", "combine fuse factors reduce"),
        ("down_bias 1", "combine fuse factors tokens inputs reduce"),
    ],
)
def test_only_what_is_asked_for(wanted: str, ran: str) -> None:
    """And never more than 2 launches forward, 4 backward."""
    case = Case(dtype=BF16)

    def needs(name: str) -> bool:
        return name == wanted

    with device.simulate(80) as run:
        cases.check_backend(case, "triton", needs=needs)
    assert [report.name.removesuffix("_kernel") for report in run.launches] == ran.split()


@ARCHITECTURES
def test_traffic(arch: int) -> None:
    """x is read once, and once more in backward with its gradient written once; so is y."""
    case = Case(
        tokens=(96, 160), dims=(256, 256), widths=(16, 16), out_len=16, dim=256, dtype=BF16,
        residual="none",
    )  # fmt: skip
    with device.simulate(arch) as run:
        tensors = {name: t.clone() for name, t in cases.inputs(case).items()}
        out = cases.run(case, tensors, "triton")
    combine, fuse, inputs = (run.total(f"{n}_kernel") for n in ("combine", "fuse", "inputs"))
    for m in range(2):
        x, dx = tensors[f"x {m}"], out[f"d_x {m}"]
        for kernel in (combine, inputs):
            moved = kernel.traffic(x)
            assert moved.read == moved.read_sectors == x.nbytes and moved.partial_read_lines == 0
        moved = inputs.traffic(dx)
        assert moved.written == moved.written_sectors == x.nbytes
        assert moved.partial_written_lines == 0
        others = [r for r in run.launches if r.name not in ("combine_kernel", "inputs_kernel")]
        assert sum(r.traffic(x).read for r in others) == 0
    moved = fuse.traffic(out["y"])
    assert moved.written == moved.written_sectors == out["y"].nbytes
    assert combine.conflict_ratio == 1.0 and fuse.conflict_ratio == 1.0
    assert inputs.conflict_ratio <= 1.1  # the few rows of dz
    assert all("mma" in str(kernel.instructions) for kernel in (combine, fuse, inputs))


def test_lengths_are_as_cut() -> None:
    """An item is what it would be without the tokens that do not count, to the bit."""
    case = Case(items=1, lengths=True, dtype=BF16, residual="leading", factor_tokens=(11, 40, 7))
    tensors = cases.inputs(case)
    tensors["lengths"] = torch.tensor([[9], [33], [7]])
    cut = dict(tensors)
    for m, length in enumerate((9, 33, 7)):
        cut[f"x {m}"] = tensors[f"x {m}"][:, :length]
        tensors[f"x {m}"][:, length:] = torch.nan
    with device.simulate(80):
        whole = cases.run(case, tensors, "triton")
    del cut["lengths"]
    with device.simulate(80):
        alone = cases.run(case, cut, "triton")
    for name, t in alone.items():
        same = whole[name]
        if name.startswith("d_x "):
            assert same[:, t.shape[1] :].count_nonzero() == 0
            same = same[:, : t.shape[1]]
        assert torch.equal(same, t), name


def test_batch_size_is_no_reason_to_compile() -> None:
    from fastadapters.kernels.sequence_fusion import ops

    names = ("combine", "fuse", "factors", "tokens", "inputs", "reduce")
    counts = []
    for items, tokens in ((1, (20, 30)), (2, (17, 32)), (5, (16, 48)), (16, (31, 33))):
        case = Case(
            items=items, tokens=tokens, dims=(64, 64), widths=(8, 8), dim=64, dtype=BF16,
            factor_tokens=(50, 50),
        )  # fmt: skip
        with device.simulate(80):
            cases.run(case, cases.inputs(case), "triton")
        kernels = (getattr(ops, f"{name}_kernel") for name in names)
        counts.append(sum(len(kernel.device_caches[80][0]) for kernel in kernels))
    assert counts[1:] == counts[:-1]


KINDS = [
    (80, ("bar.sync", "cp.async.commit_group", "cp.async.wait_group")),
    (90, ("bar.sync", "cp.async.wait_group", "wgmma.commit_group", "wgmma.wait_group")),
]


@pytest.mark.parametrize(("arch", "kinds"), KINDS)
def test_synchronisation_is_needed(arch: int, kinds: tuple[str, ...]) -> None:
    """Of the kernel that streams x."""
    case = Case(
        items=1, tokens=(130,), dims=(256,), widths=(16,), dim=64, factor_tokens=(130,),
        dtype=BF16, residual="none",
    )  # fmt: skip
    tensors = cases.inputs(case)

    def run() -> dict[str, Tensor]:
        return cases.run(case, tensors, "triton", needs=lambda name: False)

    assert missed(arch, "combine_kernel", run, kinds) == {*kinds}

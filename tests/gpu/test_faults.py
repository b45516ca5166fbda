"""The machine finds every planted bug of zoo.cu and nothing in the clean twins."""

from __future__ import annotations

import ctypes
import pathlib
import re
import shutil

import device
import pytest
import torch

SEEDS = range(3)
ZOO = {
    "global_bounds": "bounds",
    "global_alignment": "alignment",
    "shared_bounds": "bounds",
    "shared_alignment": "alignment",
    "uninitialised": "uninitialised",
    "missing_barrier": "race uninitialised",
    "missing_barrier_before_reuse": "race",
    "missing_syncwarp": "race uninitialised",
    "two_writers_in_shared": "race",
    "missing_copy_wait": "in-flight",
    "missing_copy_commit": "in-flight",
    "missing_barrier_after_copy": "race in-flight uninitialised",
    "two_blocks_on_one_word": "race",
    "missing_fence_between_blocks": "race",
    "divergent_barrier": "divergence",
    "barrier_of_one_warp": "deadlock",
    "barrier_after_exit": "divergence",
    "named_barrier": "race barrier deadlock",
    "divergent_shuffle": "divergence",
    "trapped": "trap",
}
HOPPER = {
    "bulk_copy_without_wait": "in-flight race uninitialised",
    "bulk_copy_expects_too_much": "deadlock",
    "mbarrier_not_published": "barrier race",
}


@pytest.fixture(scope="module")
def zoo() -> ctypes.CDLL:
    if shutil.which("nvcc") is None:
        pytest.skip(device.TOOLS)
    return device.cuda_library([pathlib.Path(__file__).with_name("zoo.cu")])


def launch(zoo: ctypes.CDLL, name: str, bug: bool, arch: int, seed: int) -> torch.Tensor:
    x = torch.randn(100)
    y = torch.empty(100)
    if name == "missing_fence_between_blocks":
        y.zero_()
    with device.simulate(arch, seed):
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, y))
        error = getattr(zoo, f"{name}_launch")(*pointers, 100, bug)
        assert bug or error == 0
    return y


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [*ZOO, *HOPPER])
def test_planted_bug_is_found(zoo: ctypes.CDLL, name: str, seed: int) -> None:
    arch = 90 if name in HOPPER else 80 + 10 * (seed % 2)
    launch(zoo, name, False, arch, seed)
    with pytest.raises(device.Fault) as caught:
        launch(zoo, name, True, arch, seed)
    assert caught.value.kind in (ZOO | HOPPER)[name].split(), caught.value


def test_fault_names_the_place(zoo: ctypes.CDLL) -> None:
    with pytest.raises(device.Fault) as caught:
        launch(zoo, "missing_barrier", True, 80, 0)
    text = str(caught.value)
    source = pathlib.Path(__file__).with_name("zoo.cu").read_text().splitlines()
    line = int(text.split("line ")[1].split()[0])
    assert "tile[63 - threadIdx.x]" in source[line - 1]
    assert "missing_barrier" in text and "zoo.cu" in text and "ld.shared" in text
    assert "block (" in text and "warp" in text and "thread" in text


def test_endless_loop_is_ended(zoo: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    import machine

    monkeypatch.setattr(machine, "INSTRUCTION_LIMIT", 100_000)
    launch(zoo, "endless", False, 80, 0)
    with pytest.raises(device.Fault, match="no end"):
        launch(zoo, "endless", True, 80, 0)


@pytest.mark.parametrize(("arch", "limit"), [(80, 166_912), (90, 232_448)])
def test_shared_memory_limits(zoo: ctypes.CDLL, arch: int, limit: int) -> None:
    x, y = torch.randn(64), torch.empty(64)
    with device.simulate(arch):
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, y)]
        assert zoo.large_launch(*pointers, 64, limit, limit) == 0
        assert zoo.large_launch(*pointers, 64, limit, limit + 1) != 0
        assert zoo.large_launch(*pointers, 64, 48 * 1024, 0) == 0
        assert zoo.large_launch(*pointers, 64, 48 * 1024 + 4, 0) != 0
    assert torch.equal(y, x[torch.arange(64) ^ 1])


# ---- a matrix product, and what happens to it when its instructions are changed

M, K = 100, 96


def product(
    zoo: ctypes.CDLL, seed: int = 0, swizzled: bool = True, replace: dict[str, str] | None = None
) -> tuple[float, device.Report]:
    """The error of c = a b^T relative to its largest element, and the report."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(M, K, generator=generator).bfloat16()
    b = torch.randn(64, K, generator=generator).bfloat16()
    c = torch.empty(M, 64)
    with device.simulate(80, seed, replace=replace) as run:
        assert (
            zoo.product_launch(*(ctypes.c_void_p(t.data_ptr()) for t in (a, b, c)), M, K, swizzled)
            == 0
        )
    expected = a.double() @ b.double().T
    error = (c.double() - expected).abs().max() / expected.abs().max()
    return float("inf") if error.isnan() else float(error), run.launches[0]


def product_ptx() -> tuple[str, str]:
    (name,) = [n for n in device.cuda_kernels("product") if "ILb1E" in n]
    return name, device.cuda_ptx(name, 80)


@pytest.mark.parametrize("seed", SEEDS)
def test_matrix_product(zoo: ctypes.CDLL, seed: int) -> None:
    error, report = product(zoo, seed)
    assert error < 1e-6
    assert report.count("mma.sync") == 2 * 4 * (K // 16) * 8
    assert report.conflict_ratio == 1.0
    error, report = product(zoo, seed, swizzled=False)
    assert error < 1e-6 and report.conflict_ratio > 1.5
    assert any("ldmatrix" in text for _, _, text, _, _ in report.conflicts())


WRONG = {
    "registers of A swapped": (
        r"\{(%r\d+), (%r\d+), (%r\d+), (%r\d+)\}, \{(%r\d+), (%r\d+)\}",
        r"{\2, \1, \3, \4}, {\5, \6}",
    ),
    "registers of B swapped": (
        r"\{(%r\d+), (%r\d+), (%r\d+), (%r\d+)\}, \{(%r\d+), (%r\d+)\}",
        r"{\1, \2, \3, \4}, {\6, \5}",
    ),
    "transposed": (
        r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared",
    ),
    "f16 for bf16": (r"f32\.bf16\.bf16\.f32", "f32.f16.f16.f32"),
    "shifted address": (r"(ldmatrix[^;]*\[%r\d+)\]", r"\1+16]"),
    "accumulators swapped": (r"(m16n8k16[^{]*\{)(%\w+), (%\w+)", r"\1\3, \2"),
}


@pytest.mark.parametrize("change", WRONG)
def test_wrong_matrix_instruction_is_seen(zoo: ctypes.CDLL, change: str) -> None:
    """The first instruction of the kind, changed, gives wrong numbers or a fault."""
    name, text = product_ptx()
    start = text.index(name)
    head, body = text[:start], text[start:]
    pattern, replacement = WRONG[change]
    changed, n = re.subn(pattern, replacement, body, count=1)
    assert n == 1
    try:
        error, _ = product(zoo, replace={name: head + changed})
    except device.Fault:
        return
    assert error > 1e-3


def test_every_synchronisation_is_needed(zoo: ctypes.CDLL) -> None:
    name, text = product_ptx()
    changes = list(device.mutants(text, name))
    assert len(changes) >= 6
    for change, mutant in changes:
        seen = False
        for seed in SEEDS:
            try:
                seen |= product(zoo, seed, replace={name: mutant})[0] > 1e-3
            except device.Fault:
                seen = True
        assert seen, f"without {change} nothing is wrong"

"""The test hooks, and what only they reach: the switch of instruction sets, Philox in C++."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_kernels import ISAS
from hooks import NAMESPACE, load

from fastadapters.reference import philox


def test_instruction_sets_are_switched():
    hooks = load()
    before = hooks.cpu_isa()
    names = hooks.cpu_isas()
    assert names[-1] == "portable"
    assert before in names
    try:
        for name in names:
            hooks.set_cpu_isa(name)
            assert hooks.cpu_isa() == name
        with pytest.raises(ValueError, match=r"^name: expected one of .*portable, got sse9$"):
            hooks.set_cpu_isa("sse9")
        assert hooks.cpu_isa() == "portable"
    finally:
        hooks.set_cpu_isa(before)


def test_each_dtype_has_an_instruction_set_and_a_reason():
    hooks = load()
    before = hooks.cpu_isa()
    names = hooks.cpu_isas()
    try:
        for name in names:
            hooks.set_cpu_isa(name)
            assert hooks.cpu_isa_for(1) == f"{name}: by name"
            others = name if name not in ("amx", "avx512_bf16") else "avx512"
            assert hooks.cpu_isa_for(0) == hooks.cpu_isa_for(2) == f"{others}: by name"
    finally:
        hooks.set_cpu_isa(before)


def test_bfloat16_runs_on_what_is_faster():
    """The two kinds of CPU there are: one bf16 instruction does half, or twice, an fp32 one's."""
    choose = load().choose_bfloat16
    half, twice = choose(40.5e9, 84e9), choose(170e9, 84e9)
    assert half == ("avx512", "81 GFLOP/s in bf16 against 168 in fp32, measured")
    assert twice == ("avx512_bf16", "340 GFLOP/s in bf16 against 168 in fp32, measured")


def test_what_this_cpu_lacks_is_emulated():
    flags = {*Path("/proc/cpuinfo").read_text().split()}
    hooks = load()
    avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    assert "amx" in hooks.emulated
    assert ("avx512_bf16" in hooks.emulated) == (not {*avx512, "avx512_bf16"} <= flags)
    assert ("avx512" in hooks.emulated) == (not avx512 <= flags)
    avx2 = {"avx2", "fma", "f16c"} <= flags
    assert hooks.cpu_isas() == [*(isa for isa in ISAS if avx2 and isa != "portable"), "portable"]


@pytest.mark.parametrize("seed", [(0, 0), (2**63 - 1, 5), (-1, -(2**63)), (81985529216486895, 77)])
def test_philox_stream(seed):
    rows, groups = 5, 7
    expected = philox.random_bits(torch.tensor(seed), rows, 4 * groups).reshape(-1, 4)
    key, offset = (s % 2**64 for s in seed)
    stream = load().philox(key, offset, 0, rows * groups)
    assert stream.dtype == np.uint32
    assert torch.equal(torch.from_numpy(stream.astype(np.int64)), expected)
    assert np.array_equal(load().philox(key, offset, 3, 2), stream[3:5])
    # The counter is 64-bit: past 2^32 blocks the stream does not start over.
    assert not np.array_equal(load().philox(key, offset, 2**32, 1), stream[:1])


def test_ops_are_a_copy_of_their_own():
    load()
    for name in ("bottleneck_forward", "bottleneck_backward_out"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")
    x, down, up = torch.randn(5, 16), torch.randn(4, 16), torch.randn(16, 4)
    options = (None,) * 3 + (1.0, 1e-5, 0.0, 0.0, 1, 0, 0, True, True)
    y, z, _ = torch.ops.fastadapters_hooks.bottleneck_forward(
        x, None, down, None, up, None, None, *options
    )
    torch.testing.assert_close(z, x @ down.T)
    torch.testing.assert_close(y, x + torch.relu(z) @ up.T)


def test_build_facts():
    build = load().build()
    assert build.keys() == {"compiler", "standard", "pybind11"}
    assert build["standard"] >= 201703

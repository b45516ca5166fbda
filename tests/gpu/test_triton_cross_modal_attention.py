"""The Triton kernels of cross-modal attention as compiled for sm_80 and sm_90, on the PTX machine.

What only the definition of `auto` and the functional layer decide is tested on the CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import device
import pytest
import torch
from attention_cases import (
    ADDITIVE,
    BIASES,
    INF,
    MASKED,
    attention_tensors,
    call,
    cotangents,
    reference_pair,
)
from compare import check_all
from schedules import missed

from fastadapters.reference.cross_modal_attention import Bias

pytest.importorskip("triton")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHITECTURES = pytest.mark.parametrize("arch", [80, 90], ids="sm_{}".format)


class Sample(NamedTuple):
    sizes: tuple[int, ...]  # C, I, B, H, d
    bias: Bias
    dtype: torch.dtype
    per_item: bool = False
    outputs: str = "both"


# Every block of a bias seen and blocked, ragged sizes, more than two tiles of keys and of queries.
SAMPLES = [
    Sample((150, 1, 5, 1, 32), ADDITIVE, BF16),
    Sample((37, 1, 70, 1, 16), MASKED, FP16),
    Sample((40, 3, 30, 2, 33), BIASES[2], BF16),
    Sample((70, 2, 3, 1, 20), ADDITIVE, FP32),
    Sample((35, 3, 3, 1, 16), BIASES[3], FP32, per_item=True),
    Sample((70, 1, 2, 1, 24), ADDITIVE, FP16, per_item=True),
    Sample((9, 2, 3, 1, 8), ((-INF, -INF), (0.0, 0.5)), BF16),
    Sample((20, 1, 9, 1, 128), ADDITIVE, BF16, outputs="image"),
]


@ARCHITECTURES
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_matches_reference(sample: Sample, arch: int) -> None:
    """Under the tolerance rule, and equal to the bit whatever order the warps go in."""
    tensors = attention_tensors(sample.sizes, sample.dtype, sample.per_item)
    kernels, results = torch.ops.fastadapters_triton, []
    for seed in (1, 2):
        with device.simulate(arch, seed):
            results.append(call(kernels, tensors, sample.bias, sample.outputs))
    check_all(results[0], reference_pair(tensors, sample.bias, sample.outputs), str(sample))
    for key, t in results[0].items():
        assert torch.equal(t, results[1][key]), f"{key}: another schedule differs"


@ARCHITECTURES
def test_traffic(arch: int) -> None:
    """The outputs are written once, and the gradient of the large one is read once."""
    tensors = attention_tensors((64, 1, 16, 2, 32), BF16)
    d_text = cotangents(tensors)[0]
    with device.simulate(arch) as run:
        results = call(torch.ops.fastadapters_triton, tensors, ADDITIVE)
    moved = run.total("text_out_kernel").traffic(results["out 0"])
    assert moved.written == moved.written_sectors == results["out 0"].nbytes
    over_items = run.total("text_images_kernel")
    assert over_items.traffic().read < 1.5 * d_text.nbytes + 2**18
    names = [report.name.removesuffix("_kernel") for report in run.launches]
    assert names == [
        "texts", "text_out", "image_out",
        "text_images", "text_queries", "image_queries", "text_keys", "image_keys",
    ]  # fmt: skip
    matrix = "wgmma" if arch == 90 else "mma.sync"
    for name in ("texts", "image_out", "text_keys"):
        assert run.total(f"{name}_kernel").count(matrix) > 0


@pytest.mark.parametrize("need", range(6))
def test_only_what_is_asked_for(need: int) -> None:
    tensors = attention_tensors((20, 2, 3, 1, 16), BF16)
    with device.simulate(80):
        every = call(torch.ops.fastadapters_triton, tensors, ADDITIVE)
        one = call(torch.ops.fastadapters_triton, tensors, ADDITIVE, "both", 1 << need)
    assert len(one) == 3
    for key, t in one.items():
        assert torch.equal(t, every[key]), key


KINDS = [
    (80, ("bar.sync", "cp.async.commit_group", "cp.async.wait_group")),
    (90, ("bar.sync", "cp.async.wait_group", "wgmma.commit_group", "wgmma.wait_group")),
]


@pytest.mark.parametrize(("arch", "kinds"), KINDS)
def test_synchronisation_is_needed(arch: int, kinds: tuple[str, ...]) -> None:
    """Of text keys, in whose loops are products of every kind."""
    tensors = attention_tensors((70, 1, 2, 1, 16), BF16)

    def run() -> dict[str, torch.Tensor]:
        return call(torch.ops.fastadapters_triton, tensors, ADDITIVE, "both", 0b110)

    assert missed(arch, "text_keys_kernel", run, kinds) == {*kinds}

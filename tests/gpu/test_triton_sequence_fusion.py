"""Sequence fusion in Triton as compiled for sm_80 and sm_90, run on the PTX machine."""

from __future__ import annotations

import pytest
import sequence_fusion_cases as cases
import torch
from schedules import same_under_schedules
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


@pytest.mark.parametrize("case", cases.option_cases(dtype=BF16), ids=str)
def test_matches_reference(case: Case) -> None:
    check_schedules(case, 80)

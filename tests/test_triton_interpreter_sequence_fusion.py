"""The Triton kernels of sequence fusion in Triton's interpreter: what they compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sequence_fusion_cases as cases
import torch
from interpreter import interpreted, run_in_a_process_of_its_own
from sequence_fusion_cases import Case

from fastadapters import backends

pytest.importorskip("triton")


def test_in_a_process_of_its_own() -> None:
    run_in_a_process_of_its_own(__file__)


# With relu a rounding can turn the gradient of an element on or off, which no tolerance covers.
SMOOTH = [
    case if case.activation != "relu" else replace(case, activation="silu")
    for case in cases.option_cases(dtype=torch.float16)
]
CASES = [
    *cases.option_cases(),
    *cases.shape_cases(),
    *SMOOTH,
    *cases.mixed_cases(torch.float16),
]


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend take CPU tensors, and cut them into few programs, as suits it."""
    from fastadapters.kernels.sequence_fusion import tiles

    monkeypatch.setattr(backends, "_why_not", lambda *args: None)
    monkeypatch.setattr(tiles, "tile", lambda *key: tiles.Tile(32, 128, 4, 1))
    monkeypatch.setattr(tiles, "BLOCK_O", 32)
    monkeypatch.setattr(tiles, "REDUCE_BLOCK", 4096)


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: Case) -> None:
    cases.check_backend(case, "triton")

"""Tests of GPU code on the PTX machine, see device.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cuda_backend
import device
import pytest
import torch

from fastadapters import backends, ops


@pytest.fixture(autouse=True, scope="session")
def arena() -> Iterator[None]:
    """Every tensor of these tests lies between gaps and has an exact end.

    They are small: on a busy machine a second thread of torch's costs more than it gives.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with device.arena():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CUDA backend's operators are those on the machine, which take CPU tensors."""
    operators = cuda_backend.load()
    monkeypatch.setitem(ops.NAMESPACES, "cuda", operators)
    monkeypatch.setattr(backends, "_why_not", lambda *args: None)
    return operators

"""Every test runs with outputs poisoned: memory that PyTorch hands out uninitialised holds NaN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hooks
import hypothesis
import pytest
import torch

# What is drawn is the same in every run; `make test-seeds` draws anew for each seed it gives.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("seeds", derandomize=False, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def seeded_on_one_thread() -> Iterator[None]:
    """One, because on tensors this small the threads of two test processes wait for each other."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def kernels() -> Iterator[Any]:
    """The ops of the test hooks; whatever instruction set a test chooses is put back."""
    module = hooks.load()
    before = module.cpu_isa()
    yield getattr(torch.ops, hooks.NAMESPACE)
    module.set_cpu_isa(before)

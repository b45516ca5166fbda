"""Memory that is kept: what a process pays for large tensors that come and go."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"),
    reason="needs glibc",
)

# Prints the page faults that a tensor of 96 MB costs, in two threads. Some have come and gone by
# then: what glibc cuts off a block to align it stays in a list of its own until that is full.
FAULTS = """
import resource, threading, torch

def large():
    torch.empty(96 << 20, dtype=torch.uint8).fill_(1)

def faults():
    for _ in range(40):
        large()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    large()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

faults()
thread = threading.Thread(target=faults)
thread.start()
thread.join()
"""


def run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC", "GLIBC"))}
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, "FASTADAPTERS_KEEP_PAGES": "0", **variables},
        capture_output=True,
        text=True,
        check=True,
    )


def test_kept_pages_cost_no_faults_in_any_thread() -> None:
    kept = run("import fastadapters; assert fastadapters.keep_pages()" + FAULTS)
    assert all(int(n) < 100 for n in kept.stdout.split()) and kept.stderr == ""
    default = run(FAULTS)
    assert all(int(n) > 100 for n in default.stdout.split())


def test_the_variable_does_it_at_import() -> None:
    done = run("import fastadapters" + FAULTS, FASTADAPTERS_KEEP_PAGES="1")
    assert all(int(n) < 100 for n in done.stdout.split())


@pytest.mark.parametrize("variable", ["0", "1"])
def test_another_allocator_is_noticed(variable: str) -> None:
    """One that hands out maps of its own, as if it had been preloaded."""
    script = """
import mmap, warnings, torch
torch.empty = lambda n, dtype: torch.frombuffer(mmap.mmap(-1, n), dtype=dtype)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastadapters
    print(len(caught), fastadapters.keep_pages(), caught[-1].message)
"""
    done = run(script, FASTADAPTERS_KEEP_PAGES=variable)
    reason = "PyTorch's memory does not come from glibc's malloc"
    expected = f"{variable} False fastadapters.keep_pages: no effect, {reason}"
    assert done.stdout.strip() == expected

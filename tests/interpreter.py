"""Triton's interpreter has to be chosen before Triton is imported, so what it runs are tests in a
process of their own. It gets bfloat16 wrong; tests/gpu has every dtype."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")


def run_in_a_process_of_its_own(file: str) -> None:
    if INTERPRETED:
        pytest.skip("starts the process that this is")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr

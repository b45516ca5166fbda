"""``python -m fastadapters.info`` here; test_build.py has installations without a library."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import fastadapters
from fastadapters import backends, info


def facts(report: str) -> dict[str, str]:
    rows = (line.strip().split(None, 1) for line in report.splitlines() if line.startswith("  "))
    return {key: value for key, value in rows}


def test_command_prints_the_report():
    command = [sys.executable, "-m", "fastadapters.info"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert facts(done.stdout).keys() >= {"fastadapters", "torch", "path", "reference"}
    assert done.stderr == ""


def test_versions():
    printed = facts(info.report())
    assert printed["fastadapters"] == fastadapters.__version__
    assert printed["python"] == ".".join(map(str, sys.version_info[:3]))
    assert printed["torch"].startswith(torch.__version__)


def test_backends_with_their_reasons(monkeypatch):
    monkeypatch.setattr(backends, "library_error", "_C.abi3.so did not load: undefined symbol: f")
    printed = facts(info.report())
    assert printed["path"] == backends.library_error
    assert printed["reference"] == printed["eager"] == "available"
    assert printed["cpu"] == printed["cuda"] == backends.library_error
    assert "isa" not in printed


def test_what_was_built(monkeypatch, tmp_path):
    monkeypatch.setattr(backends, "LIBRARY", tmp_path / "_C.abi3.so")
    monkeypatch.setattr(backends, "library_error", "_C.abi3.so was not built")
    built = {"build": "pure", "notes": ["built without the compiled kernels: no compiler"]}
    (tmp_path / "_build.json").write_text(json.dumps(built))
    assert "built without the compiled kernels: no compiler" in info.report()


def test_what_auto_runs_whatever_was_selected():
    selected = info.report().partition("what auto runs")[2]
    with fastadapters.backend("cuda"):
        assert info.report().partition("what auto runs")[2] == selected
    for op in backends.KERNELS:
        assert f"{op} on cpu" in selected


@pytest.mark.skipif(backends.library_error is not None, reason="no library")
def test_instruction_set_of_each_dtype():
    lines = info.report().splitlines()
    here = next(line for line in lines if "cpu isas here" in line).split()[3:]
    for dtype in ("float32", "bfloat16", "float16"):
        (line,) = (line for line in lines if f"cpu isa, {dtype} " in line)
        name, _, reason = line.split(maxsplit=3)[3].partition(": ")
        assert name in here and reason


def test_variables_in_force(monkeypatch):
    monkeypatch.setenv("FASTADAPTERS_CPU_ISA", "portable")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    printed = facts(info.report())
    assert printed["FASTADAPTERS_CPU_ISA"] == "portable"
    assert printed["OMP_NUM_THREADS"] == "1"

"""The test-hook module: built when out of date, loaded once.

    hooks = load()
    hooks.set_cpu_isa("amx")    # what this CPU lacks of AVX-512 and AMX is emulated
    torch.ops.fastadapters_hooks.bottleneck_forward(...)

Functions are in csrc/hooks.cpp. torch.ops.fastadapters_hooks is a second copy of the op library:
the schemas of torch.ops.fastadapters and the CPU kernels, without autograd or fake kernels.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastadapters  # noqa: F401  (defines the schemas)

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE = "fastadapters_hooks"


def build() -> Path:
    """Bring build/hooks up to date (0.1 s when it is) and return the module's path."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    for tool in ("cmake", "ninja", "c++"):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"the test hooks cannot be built: no {tool}")
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("the test hooks cannot be built: no pybind11")
    import fcntl  # Windows has none, nor compiled kernels

    folder = ROOT / "build" / "hooks"
    folder.mkdir(parents=True, exist_ok=True)
    configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of pytest-xdist take turns
        for command in (
            [*configure, f"-DPython_EXECUTABLE={sys.executable}"],
            ["cmake", "--build", folder, "--target", "_hooks"],
        ):
            done = subprocess.run(
                command, env=os.environ | {"PATH": path}, capture_output=True, text=True
            )
            if done.returncode != 0:
                raise RuntimeError(f"the test hooks did not build:\n{done.stdout}{done.stderr}")
    (module,) = folder.glob("_hooks.*.so")
    return module


@functools.cache
def load() -> ModuleType:
    """The module; its ops get the package's schemas. Skips the test where it cannot be built.

    Unless a test or FASTADAPTERS_CPU_ISA names another, the best instruction set that is not
    emulated runs.
    """
    spec = importlib.util.spec_from_file_location("_hooks", build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name in (
        "bottleneck_forward",
        "bottleneck_backward",
        "bottleneck_forward_out",
        "bottleneck_backward_out",
        "grouped_forward",
        "grouped_backward",
        "sequence_fusion_forward",
        "sequence_fusion_backward",
        "cross_modal_attention_forward",
        "cross_modal_attention_backward",
        "multimodal_logits_forward",
        "multimodal_logits_backward",
    ):
        schema = getattr(torch.ops.fastadapters, name).default._schema
        module.library.define(str(schema).partition("::")[2])
    if not os.environ.get("FASTADAPTERS_CPU_ISA"):
        native = (isa for isa in module.cpu_isas() if isa not in module.emulated)
        module.set_cpu_isa(next(native))
    return module

"""The package as Hugging Face's `kernels` loads it: staged, under another name, beside itself."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from setup_script import ROOT, load_setup
from torch import nn

from fastadapters import layers

# What kernel-builder writes for a package without a library.
OPS = """
import torch
ops = torch.ops._fastadapters_a1b2c3d
def add_op_namespace_prefix(op_name: str):
    return f"_fastadapters_a1b2c3d::{op_name}"
"""

# As `kernels` imports a build, and calls a layer on a module of another class.
SIDE_BY_SIDE = """
import importlib.util, sys
from types import MethodType
import torch
import fastadapters
from published import AdaptFormer, MultiWay

spec = importlib.util.spec_from_file_location("_fastadapters_a1b2c3d", sys.argv[1])
other = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(other)
assert torch.ops._fastadapters_a1b2c3d.bottleneck_forward.default
assert torch.ops._fastadapters_a1b2c3d_triton.multimodal_logits_backward.default
ours = {n for n, m in sys.modules.items() if n.split(".")[0] == "fastadapters"}
theirs = {n for n in sys.modules if n.startswith("_fastadapters_a1b2c3d.")}
assert {n.partition(".")[2] for n in theirs} == {n.partition(".")[2] for n in ours} - {""}
for kind, layer in ((AdaptFormer, "AdaptFormerAdapter"), (MultiWay, "MultiWayAdapter")):
    adapter, x = kind(16, 4), torch.randn(3, 16)
    expected = adapter(x)
    adapter.forward = MethodType(getattr(other.layers, layer).forward, adapter)
    decision, = other.explain(adapter, x)
    assert (decision.op, decision.backend) == ("bottleneck", "eager"), decision
    torch.testing.assert_close(adapter(x), expected)
    assert not fastadapters.explain(adapter, x)
    adapter.non_linear_func = torch.nn.Tanh()  # no op has it: its own forward runs
    assert other.explain(adapter, x)[0].backend == "layers"
"""


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "staged"
    subprocess.run([sys.executable, ROOT / "hub" / "stage.py", folder], check=True)
    return folder


def test_imports_are_relative(staged: Path) -> None:
    """Of the package; and nothing else is imported than PyTorch, Triton and what Python has."""
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in staged.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            assert {name.partition(".")[0] for name in names} <= allowed, path
    assert not (staged / "torch-ext" / "fastadapters" / "_ops.py").exists()  # kernel-builder's
    assert not (staged / "torch-ext" / "fastadapters" / "fastadapters").exists()


def test_every_source_is_compiled_with_its_flags(staged: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((staged / "build.toml").read_text())
    sources = load_setup().read_sources()
    for backend in ("cpu", "cuda"):
        compiled = {}
        for part in settings["kernel"].values():
            if part["backend"] == backend:
                for name in part["src"]:
                    assert name not in compiled and (staged / name).exists()
                    compiled[name] = [f for f in part.get("cxx-flags", ()) if f.startswith("-m")]
        assert compiled == {
            source.relative_to(ROOT).as_posix(): flags
            for source, flags in sources.items()
            if backend == "cuda" or source.suffix == ".cpp"
        }
    assert all((staged / name).exists() for name in settings["torch"]["src"])


def test_layers_are_a_forward_and_nothing_else() -> None:
    """What `kernels` asks of a layer, so that it can stand in for a module of another class."""
    members = {name for name, _ in inspect.getmembers(nn.Module)}
    for name in layers.__all__:
        layer = getattr(layers, name)
        assert layer.__init__ is nn.Module.__init__
        assert {n for n, _ in inspect.getmembers(layer)} - members <= {"can_torch_compile"}


def test_beside_the_package(staged: Path, tmp_path: Path) -> None:
    package = staged / "torch-ext" / "fastadapters"
    (package / "_ops.py").write_text(OPS)
    script = tmp_path / "side_by_side.py"
    script.write_text(f"import sys; sys.path.append({str(ROOT / 'tests')!r})\n{SIDE_BY_SIDE}")
    command = [sys.executable, "-W", "ignore", script, package / "__init__.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

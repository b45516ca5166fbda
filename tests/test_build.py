"""What gets built from what a machine has, and what is in the result. No C++ is compiled here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from itertools import product
from pathlib import Path

import pytest
from setup_script import ROOT, load_setup

pytest.importorskip("setuptools", minversion="77")

build = load_setup()
KNOWN = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)
CPU_TORCH = build.Torch("2.13.0+cpu", None, Path("/torch"))
CUDA_TORCH = build.Torch("2.15.0+cu132", "13.2", Path("/torch"))
NVCC = build.Nvcc("/cuda/bin/nvcc", (13, 0), KNOWN, ("-L/cuda/lib64",))


def plan(env=None, torch=CPU_TORCH, compiler="c++", nvcc=None, system="Linux", cuda_sources=True):
    tools = build.Tools(torch, compiler, nvcc)
    return build.plan(env or {}, tools, system=system, cuda_sources=cuda_sources)


@pytest.mark.parametrize(
    ("machine", "built", "note"),
    [
        ({}, "cpu", None),
        ({"nvcc": NVCC}, "cuda", None),
        ({"torch": CUDA_TORCH, "nvcc": NVCC}, "cuda", None),
        ({"torch": CUDA_TORCH}, "cpu", "built without CUDA: no working nvcc"),
        ({"torch": CUDA_TORCH, "cuda_sources": False}, "cpu", None),
        ({"nvcc": NVCC, "cuda_sources": False}, "cpu", None),
        ({"nvcc": NVCC._replace(version=(12, 4))}, "cpu", "nvcc 12.4 is older than 12.8"),
        ({"torch": None}, "pure", "PyTorch is not installed"),
        ({"torch": None, "nvcc": NVCC}, "pure", "PyTorch is not installed"),
        ({"torch": CPU_TORCH._replace(version="2.10.1")}, "pure", "2.10.1 is older than 2.11"),
        ({"torch": CPU_TORCH._replace(version="2.9.0a0+git1")}, "pure", "is older than 2.11"),
        ({"torch": CPU_TORCH._replace(version="3.0.0")}, "cpu", None),
        ({"compiler": None}, "pure", "no C++ compiler"),
        ({"compiler": None, "torch": None}, "pure", "PyTorch is not installed"),
        ({"system": "Darwin"}, "pure", "built on Linux, not on Darwin"),
    ],
)
def test_auto_takes_what_there_is_and_says_what_it_left_out(machine, built, note):
    made = plan(**machine)
    assert made.build == built
    assert len(made.notes) == (note is not None)
    assert all(note in line and "\n" not in line for line in made.notes)
    # An empty variable is an unset one.
    assert plan({"FASTADAPTERS_BUILD": ""}, **machine) == made


@pytest.mark.parametrize(
    ("torch", "compiler", "nvcc", "system", "cuda_sources"),
    [
        *product(
            (None, CPU_TORCH, CUDA_TORCH, CPU_TORCH._replace(version="2.10.0")),
            (None, "c++"),
            (None, NVCC, NVCC._replace(version=(12, 6)), NVCC._replace(architectures=(75,))),
            ("Linux", "Windows"),
            (False, True),
        )
    ],
)
def test_every_machine(torch, compiler, nvcc, system, cuda_sources):
    machine = {
        "torch": torch,
        "compiler": compiler,
        "nvcc": nvcc,
        "system": system,
        "cuda_sources": cuda_sources,
    }
    can_cpu = torch in (CPU_TORCH, CUDA_TORCH) and compiler is not None and system == "Linux"
    can_cuda = can_cpu and nvcc is NVCC and cuda_sources
    best = "cuda" if can_cuda else "cpu" if can_cpu else "pure"
    assert plan(**machine).build == best
    assert plan({"FASTADAPTERS_BUILD": "pure"}, **machine)[2:] == ((), ())
    for wanted, can in (("cpu", can_cpu), ("cuda", can_cuda)):
        env = {"FASTADAPTERS_BUILD": wanted}
        if can:
            made = plan(env, **machine)
            assert (made.build, made.notes) == (wanted, ())
            assert bool(made.gencode) == (wanted == "cuda")
        else:
            with pytest.raises(ValueError, match=f"^FASTADAPTERS_BUILD={wanted}: [^\n]+$"):
                plan(env, **machine)


def test_default_architectures_and_ptx():
    *real, ptx = plan(nvcc=NVCC).gencode
    assert real == [f"-gencode=arch=compute_80,code=sm_{a}" for a in (80, 86, 89, 90, 100, 120)]
    assert ptx == "-gencode=arch=compute_80,code=compute_80"
    older = plan(nvcc=NVCC._replace(architectures=(80, 86, 90)))
    assert older.gencode[-2:] == (real[3], ptx)
    assert len(older.gencode) == 4
    assert older.notes == ()


def test_architectures_by_name():
    made = plan({"TORCH_CUDA_ARCH_LIST": "7.0 7.5;8.0, 9.0a+PTX"}, nvcc=NVCC)
    assert made.gencode == (
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    )
    assert made.notes == ("TORCH_CUDA_ARCH_LIST: left out 7.0, 7.5, not supported",)
    unsupported = {"TORCH_CUDA_ARCH_LIST": "7.5"}
    assert plan(unsupported, nvcc=NVCC).build == "cpu"
    assert plan(unsupported, nvcc=NVCC).notes[0].endswith("nvcc supports nothing in 7.5")
    with pytest.raises(ValueError, match=r"FASTADAPTERS_BUILD=cuda: nvcc supports nothing in 7\.5"):
        plan({**unsupported, "FASTADAPTERS_BUILD": "cuda"}, nvcc=NVCC)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FASTADAPTERS_BUILD", "gpu"),
        ("MAX_JOBS", "0"),
        ("MAX_JOBS", "many"),
        ("TORCH_CUDA_ARCH_LIST", "Ampere"),
        ("TORCH_CUDA_ARCH_LIST", "sm_90"),
    ],
)
def test_a_mistyped_variable_is_an_error(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*{value!r}"):
        plan({name: value}, nvcc=NVCC)


def test_jobs():
    assert plan({"MAX_JOBS": "3"}).jobs == 3
    assert plan().jobs == os.cpu_count()


def test_commands():
    sources = {Path("ops.cpp"): [], Path("avx2.cpp"): ["-mavx2"], Path("kernel.cu"): ["--fmad"]}
    tools = build.Tools(CPU_TORCH, "ccache g++-12", NVCC)
    cpu, link, _ = build.commands(build.Plan("cpu", 2), tools, sources)
    assert [*cpu] == [Path("ops.cpp"), Path("avx2.cpp")]
    assert cpu[Path("avx2.cpp")][:2] == ["ccache", "g++-12"]
    assert cpu[Path("avx2.cpp")][-3:] == ["-mavx2", "-c", "avx2.cpp"]
    assert "-mavx2" not in cpu[Path("ops.cpp")]
    assert link[:3] == ["ccache", "g++-12", "-shared"]

    made = build.Plan("cuda", 2, ("-gencode=x",))
    cuda, _, libraries = build.commands(made, tools, sources)
    nvcc = cuda[Path("kernel.cu")]
    assert nvcc[:2] == ["/cuda/bin/nvcc", "-ccbin=g++-12"]
    assert {"-gencode=x", "--threads=2", "--fmad"} < {*nvcc}
    assert {"-L/torch/lib", "-L/cuda/lib64", "-lcudart_static"} < {*libraries}
    assert "-DFASTADAPTERS_CUDA" in cuda[Path("ops.cpp")]
    assert "-DFASTADAPTERS_CUDA" not in cpu[Path("ops.cpp")]


def test_cmake_and_setup_read_the_same_list(tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja"]
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DFASTADAPTERS_EMULATE="]
    subprocess.run([*configure, *options], check=True)
    entries = json.loads((tmp_path / "compile_commands.json").read_text())
    commands = {Path(e["file"]): e["command"].split() for e in entries}
    sources = {s: flags for s, flags in build.read_sources().items() if s.suffix == ".cpp"}
    listed = {p for p in commands if p.suffix == ".cpp" and p.is_relative_to(ROOT / "csrc")}
    assert listed == {*sources, ROOT / "csrc" / "hooks.cpp"}
    for source, flags in sources.items():
        own = [f for f in commands[source] if f.startswith("-m")]
        assert own == flags

    cache = (tmp_path / "CMakeCache.txt").read_text()
    architectures = re.search(r"^FASTADAPTERS_CUDA_ARCHITECTURES:\w+=(.*)$", cache, re.M)[1]
    assert tuple(map(int, re.findall(r"\d+", architectures))) == build.ARCHITECTURES


def test_sources_are_all_listed():
    files = {p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu")}
    assert files - {ROOT / "csrc" / "hooks.cpp"} == {*build.read_sources()}


@pytest.fixture(scope="module")
def pure(tmp_path_factory):
    """A pure wheel, unpacked: what an installation without a compiler gets."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("fastadapters", "kernels", "csrc"):
        leave_out = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        shutil.copytree(ROOT / name, tree / name, ignore=leave_out)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tree]
    # No compiler on PATH, and nothing asked for: the installation must succeed.
    env = {k: v for k, v in os.environ.items() if k not in ("FASTADAPTERS_BUILD", "CXX")}
    subprocess.run([*pip, tree], check=True, env=env | {"PATH": str(tree)}, cwd=tree)
    (wheel,) = tree.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    installed = tree / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    return installed


def test_pure_wheel(pure):
    roots = {"fastadapters": ROOT / "fastadapters", "fastadapters/kernels": ROOT / "kernels"}
    expected = {
        Path(name, p.parent.relative_to(root))
        for name, root in roots.items()
        for p in root.rglob("__init__.py")
    }
    assert {p.parent.relative_to(pure) for p in pure.rglob("__init__.py")} == expected
    assert {p.name for p in pure.iterdir() if p.suffix != ".dist-info"} == {"fastadapters"}
    assert (pure / "fastadapters" / "py.typed").exists()
    assert not list(pure.rglob("*.so"))
    folders = (ROOT / "kernels", pure / "fastadapters" / "kernels")
    sources, installed = ({p.relative_to(f) for p in f.rglob("*.py")} for f in folders)
    assert installed == sources


def run_installed(installed: Path, *command: str) -> str:
    env = os.environ | {"PYTHONPATH": str(installed), "PATH": ""}
    env.pop("FASTADAPTERS_BACKEND", None)
    done = subprocess.run(
        [sys.executable, *command], env=env, cwd=installed, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


USE = """
import torch, fastadapters, fastadapters.kernels
x = torch.randn(3, 8, requires_grad=True)
y = fastadapters.functional.bottleneck(x, torch.randn(2, 8), torch.randn(8, 2))
y.sum().backward()
print(fastadapters.__file__, x.grad.shape)
"""


def test_without_the_library_everything_works_and_info_says_why(pure):
    assert run_installed(pure, "-c", USE).startswith(str(pure))
    report = run_installed(pure, "-m", "fastadapters.info")
    assert "_C.abi3.so was not built" in report
    assert "no C++ compiler was found" in report
    assert re.search(r"bottleneck on cpu +eager: .*_C\.abi3\.so was not built", report)


def damaged(tree: Path) -> dict[str, tuple[bytes, str]]:
    """What may lie in the library's place, and what is said of it."""
    source, other = tree / "other.c", tree / "other.so"
    source.write_text("int nothing;")
    subprocess.run(["cc", "-shared", "-o", other, source], check=True)
    whole = other.read_bytes()
    return {
        "no library": (b"\x7fELF, but only just", "is damaged"),
        "empty": (b"", "is damaged"),
        "cut short": (whole[: len(whole) // 2], "is damaged"),
        "without symbols": (whole.replace(b"\x7fELF\x02\x01", b"\x7fELF\x02\x02"), "did not load"),
        "another library": (whole, "has none of the ops"),
    }


def test_with_a_library_that_does_not_load_everything_works_and_info_says_why(pure, tmp_path):
    library = pure / "fastadapters" / "_C.abi3.so"
    for contents, said in damaged(tmp_path).values():
        library.write_bytes(contents)
        try:
            shown = "\nfrom fastadapters import info; print(info.report())"
            report = run_installed(pure, "-c", USE + shown)
        finally:
            library.unlink()
        assert re.search(rf"_C\.abi3\.so {said}", report)


def test_info_says_which_copy_it_looks_at(pure):
    report = run_installed(pure, "-m", "fastadapters.info")
    assert re.search(rf"package +{pure}/fastadapters$", report, re.M)
    code = (
        "from fastadapters import info; info.__file__ = '/elsewhere/info.py'; print(info.report())"
    )
    report = run_installed(pure, "-c", code)
    assert f"another copy is installed in {pure}/fastadapters" in report


def test_without_the_library_the_first_op_warns(pure):
    code = f"""
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {USE.strip().replace(chr(10), chr(10) + "    ")}
    y = fastadapters.functional.bottleneck(x, torch.randn(2, 8), torch.randn(8, 2))
(only,) = caught
print(only.message)
"""
    said = run_installed(pure, "-c", code)
    assert "_C.abi3.so was not built" in said and "pip install --no-build-isolation" in said


def test_other_cpus_compile_what_needs_no_flags(monkeypatch):
    here = build.read_sources()
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    there = build.read_sources()
    assert set(there) == {source for source, flags in here.items() if not flags}
    assert build.CSRC / "cpu" / "bottleneck" / "portable.cpp" in there


def test_an_old_setuptools_is_named(monkeypatch):
    monkeypatch.setattr(build.setuptools, "__version__", "68.2.0")
    with pytest.raises(SystemExit, match=r"setuptools 68\.2\.0 is older than 77: pip install"):
        build.main()


def test_cuda_kernels_are_for_the_gpus_that_are_here():
    tools = build.Tools(CUDA_TORCH, "c++", NVCC, "8.9;9.0")
    made = build.plan({}, tools, system="Linux", cuda_sources=True)
    assert [flag.rpartition("=")[2] for flag in made.gencode] == ["sm_89", "sm_90"]
    asked = build.plan({"TORCH_CUDA_ARCH_LIST": "8.0"}, tools, system="Linux", cuda_sources=True)
    assert len(asked.gencode) == 1
    assert "sm_89 sm_90" in build.describe(made, 20)
    assert "FASTADAPTERS_BUILD=cpu" in build.describe(made, 20)


@pytest.mark.parametrize("wanted", ["cpu", "cuda"])
def test_a_build_that_was_asked_for_fails_in_one_line(wanted, tmp_path):
    env = os.environ | {"PATH": str(tmp_path), "FASTADAPTERS_BUILD": wanted}
    env.pop("CXX", None)
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: FASTADAPTERS_BUILD={wanted}: no C++ compiler was found "
        "(GCC 11 or Clang 12 at least; CXX names one)\n"
    )

"""What a developer's tools, and other people's, find in the project's files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from setup_script import ROOT

TOOLS = Path(sys.executable).parent


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | (env or {}),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_another_project_sees_the_types(tmp_path: Path) -> None:
    """From outside of the checkout the package is where it is installed, editable or not."""
    pytest.importorskip("mypy")
    shutil.copy(ROOT / "tests" / "typed_calls.py", tmp_path)
    options = ("--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache")
    said = run(sys.executable, "-m", "mypy", *options, "typed_calls.py", cwd=tmp_path)
    assert "Success" in said


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git knows what there is")
def test_the_sdist_has_all_that_its_tests_import(tmp_path: Path) -> None:
    """`make release-check` collects them from it."""
    pytest.importorskip("setuptools", minversion="77")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", code, cwd=ROOT, env={"FASTADAPTERS_BUILD": "pure"})
    (archive,) = tmp_path.glob("fastadapters-*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    needless = (".github/", ".gitignore")
    assert packed >= {name for name in tracked if not name.startswith(needless)}


def test_a_commit_is_formatted_and_checked(tmp_path: Path) -> None:
    """`pre-commit install` is all there is to do, and no hook needs a network."""
    pytest.importorskip("pre_commit")
    for name in (".pre-commit-config.yaml", "pyproject.toml", ".clang-format"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(TOOLS)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "ugly.py").write_text("x = [ 1,2 ]\n")
    (tmp_path / "tests" / "ugly.h").write_text("int   f( ){return 1;}\n")
    nowhere = {
        "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9",
        "PRE_COMMIT_HOME": str(tmp_path / "cache"), "SKIP": "mypy",
        "GIT_CONFIG_GLOBAL": "/dev/null",
    }  # fmt: skip
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
    run("git", "init", "-q", cwd=tmp_path)
    run(sys.executable, "-m", "pre_commit", "install", cwd=tmp_path, env=nowhere)
    run("git", "add", "tests", ".pre-commit-config.yaml", cwd=tmp_path)
    commit = [*git, "commit", "-qm", "ugly"]
    first = subprocess.run(commit, cwd=tmp_path, env=os.environ | nowhere, capture_output=True)
    assert first.returncode != 0 and b"files were modified" in first.stderr + first.stdout
    assert (tmp_path / "tests" / "ugly.py").read_text() == "x = [1, 2]\n"
    assert (tmp_path / "tests" / "ugly.h").read_text().startswith("int f()")
    run("git", "add", "tests", cwd=tmp_path)
    run(*commit, cwd=tmp_path, env=nowhere)

"""What README.md and docs/ show runs as it stands, page by page, and names what is there."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import fastadapters
from fastadapters import functional

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Pages that start a group of processes are run in a process of their own.
APART = {"distributed.md"}


def blocks(page: Path) -> str:
    """The Python of a page as one program, each line where it is on the page."""
    text = page.read_text()
    lines = [""] * (text.count("\n") + 1)
    for found in BLOCK.finditer(text):
        first = text[: found.start(1)].count("\n")
        code = found[1].splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.stem
)
@pytest.mark.usefixtures("seeded_on_one_thread")
def test_every_snippet_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = blocks(page)
    monkeypatch.chdir(tmp_path)
    if page.name not in APART:
        exec(compile(code, str(page), "exec"), {"__name__": "__main__"})
        return
    script = tmp_path / "page.py"
    # PyTorch's gloo may hang in its destructor at the end of a process.
    script.write_text(f"{code}\nimport os\nprint('done', flush=True)\nos._exit(0)\n")
    env = {
        **os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": "29611", "RANK": "0",
        "WORLD_SIZE": "1", "LOCAL_RANK": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, script], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr


def test_every_design_has_a_constructor_that_works() -> None:
    text = (ROOT / "README.md").read_text()
    table = text.partition("<!-- designs:begin -->")[2].partition("<!-- designs:end -->")[0]
    rows = table.strip().splitlines()[2:]
    assert len(rows) >= 11
    for row in rows:
        call = row.split("|")[2].split("`")[1]
        names = {name: getattr(fastadapters, name) for name in fastadapters.__all__}
        assert isinstance(eval(call, {**names, "F": functional}), nn.Module), call


def test_pictures_are_as_the_script_draws_them() -> None:
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "designs" / "draw.py")
    assert spec and spec.loader
    draw = importlib.util.module_from_spec(spec)
    sys.modules["draw"] = draw  # NamedTuple looks its annotations up there
    spec.loader.exec_module(draw)
    for name, picture in draw.PICTURES.items():
        assert draw.svg(picture) == (ROOT / "docs" / "designs" / f"{name}.svg").read_text()


def test_links_lead_somewhere() -> None:
    """Those within the repository: files, and headings of pages; what `make docs` checks, too,
    where it knows the page: of the API it makes the headings."""
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith(("http:", "https:")):
                continue
            path, _, anchor = target.partition("#")
            file = page if not path else (page.parent / path).resolve()
            assert file.exists(), f"{page.name}: {target}"
            if anchor and file.name != "api.md":
                heads = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in heads}
                assert anchor in slugs, f"{page.name}: {target}"

"""docs/troubleshooting.md has every sentence that the package can say, and none that it cannot."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()

# "NAME: expected ..., got ...": one line of the page for all that bad arguments raise.
ARGUMENT = re.compile(r"[\w.\[\]]+: expected .*, got ", re.DOTALL)
# What is a part of such a message: said by the functions that check, or by these names.
PARTS = {"expected", "which"}
# What is no message: how things print themselves, where a table's entries come from.
APART = {"__repr__", "extra_repr", "LIMITS"}
SCHEMA = re.compile(r"->|(Tensor|SymInt|int|float|bool)\S* \w")


def words(text: str) -> int:
    return len(re.findall(r"[A-Za-z]{2,}", text))


def literal(node: ast.AST) -> str | None:
    """A string with ... for what it is given; None for what is no string."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) or "..." for part in node.values)
    return None


def sentences(node: ast.AST, name: str = "") -> Iterator[str]:
    """The strings of three words and more below ``node`` that are messages."""
    text = literal(node)
    if text is not None:
        if words(text) >= 3 and " " in text.strip():
            yield text
        # What a message is given is often a choice between further words.
        for part in node.values if isinstance(node, ast.JoinedStr) else ():
            if isinstance(part, ast.FormattedValue):
                yield from sentences(part.value)
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return  # a docstring
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in APART:
        return
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if ast.unparse(target) in PARTS | APART:
            return
    if isinstance(node, ast.Call) and "check_" in ast.unparse(node.func):
        return
    for child in ast.iter_child_nodes(node):
        yield from sentences(child)


def python_messages() -> Iterator[str]:
    """Of the package and of its build; info's lines are a report, which explains itself."""
    files = [*(ROOT / "fastadapters").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    for file in [*files, ROOT / "setup.py"]:
        if file.name in ("info.py", "checks.py"):
            continue
        for text in sentences(ast.parse(file.read_text())):
            if not ARGUMENT.match(text) and not ("ops" in file.parts and SCHEMA.search(text)):
                yield text


def compiled_messages() -> Iterator[str]:
    """Of the library: literals, as the compiler joins them; none of assembler or a format."""
    quoted = r'"((?:\\.|[^"\\\n])*)"'
    for file in (ROOT / "csrc").rglob("*"):
        if file.suffix not in (".cpp", ".h", ".cu", ".cuh") or re.search("hooks|emul", file.name):
            continue
        code = re.sub(r"//.*|^\s*#.*", "", file.read_text(), flags=re.MULTILINE)
        # What a check expects is said in pieces.
        for statement in (part for part in code.split(";") if "expected" not in part):
            for found in re.finditer(rf"{quoted}(?:\s*{quoted})*", statement):
                text = "".join(re.findall(quoted, found[0]))
                if words(text) >= 3 and " " in text.strip() and "%" not in text:
                    yield text


PYTHON, COMPILED = sorted(set(python_messages())), sorted(set(compiled_messages()))


def test_there_are_messages() -> None:
    assert len(PYTHON) > 80 and len(COMPILED) > 5
    assert "FSDP2 has set its class: patch before fully_shard" in PYTHON  # returned
    assert "it has no LoRA adapter" in PYTHON
    assert any("has no kernel here that can train" in text for text in PYTHON)  # raised
    assert any("instruction sets of this CPU" in text for text in COMPILED)


@pytest.mark.parametrize("text", [*PYTHON, *COMPILED])
def test_every_message_has_its_cure(text: str) -> None:
    longest = max(text.split("..."), key=len).strip(" .;:")
    assert longest in PAGE, text


def test_every_cure_has_its_message() -> None:
    """What the page quotes in the first column of its tables is said somewhere."""
    files = [*(ROOT / "fastadapters").rglob("*.py"), *(ROOT / "csrc").rglob("*"), ROOT / "setup.py"]
    code = " ".join(file.read_text() for file in files if file.is_file())
    said = " ".join(re.sub(r"""["']\s*f?["']""", "", code).split())
    rows = re.findall(r"^\| (`.*?`) (?:\(|\||,)", PAGE, re.MULTILINE)
    assert len(rows) > 60
    for row in rows:
        for piece in re.split(r"\.\.\.|NAME|[:;] ", row.strip("` ")):
            if words(piece) >= 2:
                assert piece.strip(" .;:,") in said, row

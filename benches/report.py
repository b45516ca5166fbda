"""Tables and plots from the JSON of `pytest benches/ --benchmark-json=FILE`.

python -m benches.report FILE.json...            prints the tables
python -m benches.report --write FILE.json...    also puts the short one into README.md and all of
                                                 them into docs/measured.md, between the markers,
                                                 and draws docs/speed.svg and docs/bench.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .harness import COMPILE_MODES, Row
from .plots import bars, speed

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
BASELINES = {
    "reference": ("reference",),
    "eager": ("eager",),
    "compiled": tuple(
        f"{mode} {name}" for mode in COMPILE_MODES for name in ("reference", "eager")
    ),
}
TITLES = {
    "reference": "x published",
    "eager": "x plain PyTorch",
    "compiled": "x torch.compile",
}


def fastest(row: Row, baseline: str) -> str | None:
    """Which form of a baseline that has several was the fastest."""
    names = [name for name in BASELINES[baseline] if name in row.seconds]
    return min(names, key=row.seconds.__getitem__, default=None)


def best(row: Row, baseline: str) -> float | None:
    """Seconds of a baseline: of the fastest where it has several forms."""
    name = fastest(row, baseline)
    return None if name is None else row.seconds[name]


def number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def ratio(row: Row | None, baseline: str) -> str:
    """How many times as fast ours is: in bold where it loses, with "even" where noise decides."""
    name = None if row is None else fastest(row, baseline)
    if row is None or name is None:
        return "-"
    text = number(row.seconds[name] / row.seconds["ours"])
    low, high = row.ratios.get(name, (0.0, 0.0))
    if low < 1.0 < high:
        return f"even ({number(low)} to {number(high)})"
    return f"**{text}**" if row.seconds[name] < row.seconds["ours"] else text


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def place(row: Row) -> str:
    return f"{row.threads} thread{'s' * (row.threads > 1)}" if row.device == "cpu" else row.device


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def peaks(row: Row) -> str:
    """MiB that ours and plain PyTorch hold at most."""
    both = [row.peak_bytes[name] for name in ("ours", "eager") if name in row.peak_bytes]
    return " / ".join(f"{n / 2**20:.3g}" for n in both)


def op_table(rows: Sequence[Row]) -> str:
    """A line for each op row by default; ratios with kept pages in brackets."""

    def key(row: Row) -> tuple[Any, ...]:
        return row.op, row.workload, row.direction, row.dtype, row.device, row.threads

    by_malloc: dict[str, dict[tuple[Any, ...], Row]] = {"default": {}, "kept": {}}
    for row in rows:
        by_malloc[row.malloc][key(row)] = row
    default, kept = by_malloc["default"] or by_malloc["kept"], by_malloc["kept"]
    lines = []
    for k, row in default.items():
        other = kept.get(k)
        line = [row.workload, row.direction, row.dtype, place(row)]
        if row.match != "yes":
            lines.append([*line, "-", "-", "-", "-", "-", "-", row.match])
            continue
        ratios = [ratio(row, name) for name in BASELINES]
        if other is not None and other is not row and other.match == "yes":
            ratios = [f"{r} [{ratio(other, n)}]" for r, n in zip(ratios, BASELINES, strict=True)]
        share = row.roof_seconds / row.seconds["ours"]
        lines.append(
            [*line, f"{ms(row.seconds['ours'])} ({row.backend})", *ratios,
             f"{share:.0%} {row.roof}", peaks(row), row.match]
        )  # fmt: skip
    return markdown(
        ("workload", "direction", "dtype", "on", "ours, ms (backend)", *TITLES.values(),
         "% of roof", "peak MiB of tensors, ours / plain", "right"),
        lines,
    )  # fmt: skip


def other_table(rows: Sequence[Row]) -> str:
    """Rows with candidates of their own: a line for each, all medians written out."""
    lines = []
    for row in rows:
        times = ", ".join(f"{name} {ms(t)}" for name, t in row.seconds.items()) or "-"
        line = (
            row.workload,
            row.direction,
            row.dtype,
            place(row) + (", kept pages" if row.malloc == "kept" else ""),
        )
        lines.append((*line, times, row.notes, row.match))
    return markdown(("workload", "direction", "dtype", "on", "ms", "", "right"), lines)


def has_roof(row: Row) -> bool:
    """Whether a row is of an op; those of other benches have candidates of their own."""
    return bool(row.roof)


def tables(rows: Sequence[Row]) -> str:
    """Every row, losing ones included."""
    parts = []
    for op in dict.fromkeys(row.op for row in rows):
        some = [row for row in rows if row.op == op]
        of_op = any(has_roof(row) or row.match != "yes" for row in some)
        parts.append(f"**{op}**\n\n" + (op_table if of_op else other_table)(some))
    skipped = {f"{n} on {r.workload}: {why}" for r in rows for n, why in r.skipped.items()}
    return "\n\n".join([*parts, *(f"Could not run: {line}." for line in sorted(skipped))])


def short_table(rows: Sequence[Row]) -> str:
    """A line for each op row's training step with the default malloc."""
    lines = [
        (row.op, row.workload, row.dtype, ms(row.seconds["ours"]),
         *(ratio(row, name) for name in BASELINES), peaks(row))
        for row in rows
        if has_roof(row) and row.direction == "training step" and row.malloc == "default"
    ]  # fmt: skip
    head = (
        "op",
        "workload",
        "dtype",
        "ours, ms",
        *TITLES.values(),
        "peak MiB of tensors, ours / plain",
    )
    notes = [f"{row.workload}, {row.dtype}: {row.notes}." for row in rows if row.op == "end to end"]
    return "\n\n".join([markdown(head, lines), *notes])


def load(paths: Sequence[Path]) -> tuple[list[Row], str]:
    """The rows of all files, and one line about the machine."""
    rows: list[Row] = []
    machines = []
    for path in paths:
        data = json.loads(path.read_text())
        rows += [Row(**row) for row in data["rows"]]
        info = data["machine_info"]
        cpu, about = info["cpu"], info["fastadapters"]
        name = about.get("gpu") or f"{cpu.get('brand_raw', cpu.get('arch'))}, {cpu['count']} cores"
        machines.append(f"{name}, PyTorch {about['torch']}")
    return rows, "; ".join(dict.fromkeys(machines))


def write(page: Path, text: str) -> None:
    """Put the text between the markers of a page."""
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="update README.md and docs/")
    args = parser.parse_args()
    rows, machine = load(args.files)
    text = f"{machine}\n\n{tables(rows)}"
    print(text)
    if args.write:
        write(ROOT / "README.md", f"{machine}, training steps:\n\n{short_table(rows)}")
        write(ROOT / "docs" / "measured.md", text)
        shown = [
            (row, {n: best(row, n) for n in BASELINES} | {"ours": row.seconds["ours"]})
            for row in rows
            if has_roof(row) and "reference" in row.seconds and row.malloc == "default"
        ]
        bars(shown, machine, ROOT / "docs" / "bench.svg")
        speed(shown, machine, ROOT / "docs" / "speed.svg")


if __name__ == "__main__":
    main()

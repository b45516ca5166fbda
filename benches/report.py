"""Tables and a plot from the JSON of `pytest benches/ --benchmark-json=FILE`.

python -m benches.report FILE.json...            prints the tables
python -m benches.report --auto FILE.json...     the choice of `auto` alone, against eager
python -m benches.report --write FILE.json...    also puts them into README.md, between the markers,
                                                 and draws docs/bench.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .harness import COMPILE_MODES, Row

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
LOSES = 0.97  # of eager: what is below is no noise
BASELINES = {
    "reference": ("reference",),
    "eager": ("eager",),
    "compiled": tuple(
        f"{mode} {name}" for mode in COMPILE_MODES for name in ("reference", "eager")
    ),
}


def best(row: Row, baseline: str) -> float | None:
    """Seconds of a baseline: of the fastest where it has several forms."""
    times = [row.seconds[name] for name in BASELINES[baseline] if name in row.seconds]
    return min(times, default=None)


def ratio(row: Row | None, baseline: str) -> str:
    """How many times faster ours is; in bold where it loses."""
    time = None if row is None else best(row, baseline)
    if row is None or time is None:
        return "-"
    value = time / row.seconds["ours"]
    text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
    return f"**{text}**" if value < 1.0 else text


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def place(row: Row) -> str:
    return f"{row.threads} thread{'s' * (row.threads > 1)}" if row.device == "cpu" else row.device


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


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
        peaks = [
            f"{row.peak_bytes[n] / 2**20:.3g}" for n in ("ours", "eager") if n in row.peak_bytes
        ]
        lines.append(
            [*line, f"{ms(row.seconds['ours'])} ({row.backend})", *ratios,
             f"{share:.0%} {row.roof}", " / ".join(peaks), row.match]
        )  # fmt: skip
    return markdown(
        ("workload", "direction", "dtype", "on", "ours, ms", "x reference", "x eager", "x compiled",
         "% of roof", "peak MiB, ours / eager", "match"),
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
    return markdown(("workload", "direction", "dtype", "on", "ms", "", "match"), lines)


def auto_table(rows: Sequence[Row]) -> str:
    """The backend that `auto` chose, and how many times faster it is; in bold where it loses."""
    places = sorted({place(row) for row in rows})
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    lost = cells = 0
    for row in rows:
        line = lines.setdefault((row.op, row.workload, row.direction, row.dtype), {})
        eager = best(row, "eager")
        if eager is None or row.match != "yes":
            line[place(row)] = row.match
            continue
        value = eager / row.seconds["ours"]
        cells += 1
        lost += value < LOSES
        text = f"**{value:.2f}**" if value < LOSES else f"{value:.2f}"
        line[place(row)] = f"{row.backend}: {text} / {ratio(row, 'compiled')}"
    head = ("op", "workload", "direction", "dtype", *(f"{p}: x eager / compiled" for p in places))
    table = markdown(head, ([*k, *(v.get(p, "-") for p in places)] for k, v in lines.items()))
    return f"{table}\n\n{lost} of {cells} below {LOSES} of eager."


def tables(rows: Sequence[Row]) -> str:
    """Every row, losing ones included."""
    parts = []
    for op in dict.fromkeys(row.op for row in rows):
        some = [row for row in rows if row.op == op]
        with_roof = any(row.roof for row in some) or any(row.match != "yes" for row in some)
        parts.append(f"**{op}**\n\n" + (op_table if with_roof else other_table)(some))
    skipped = {f"{n} on {r.workload}: {why}" for r in rows for n, why in r.skipped.items()}
    return "\n\n".join([*parts, *(f"Could not run: {line}." for line in sorted(skipped))])


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


def plot(rows: Sequence[Row], machine: str, path: Path) -> None:
    """Bars of the time of each form relative to the published module's."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "fastadapters"
    shown = [r for r in rows if r.roof and "reference" in r.seconds and r.malloc == "default"]
    forms = (*BASELINES, "ours")
    height = 0.8 / len(forms)
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.55 * len(shown)), layout="constrained")
    for i, form in enumerate(forms):
        times = [r.seconds["ours"] if form == "ours" else best(r, form) for r in shown]
        values = [(t or 0.0) / r.seconds["reference"] for t, r in zip(times, shown, strict=True)]
        where = [j + (i - 1.5) * height for j in range(len(shown))]
        bars = axes.barh(where, values, height, label=form)
        axes.bar_label(bars, [ms(t) + " ms" if t else "" for t in times], padding=2, fontsize=6)
    labels = [f"{r.workload}\n{r.direction}, {r.dtype}, {place(r)}" for r in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time relative to the published module (shorter is better)")
    axes.set_title(machine, fontsize=8)
    figure.legend(loc="outside lower right", ncols=len(forms), fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="update README.md and docs/bench.svg")
    parser.add_argument("--auto", action="store_true", help="whether `auto` loses to eager")
    args = parser.parse_args()
    rows, machine = load(args.files)
    timed = [row for row in rows if row.roof or row.match != "yes"]
    text = f"{machine}\n\n{auto_table(timed) if args.auto else tables(rows)}"
    print(text)
    if args.write:
        readme = ROOT / "README.md"
        before, rest = readme.read_text().split(BEGIN)
        after = rest.split(END)[1]
        readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
        plot(rows, machine, ROOT / "docs" / "bench.svg")


if __name__ == "__main__":
    main()

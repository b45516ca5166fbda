"""The pictures of docs/: times relative to the published module's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .harness import Row

Shown = Sequence[tuple[Row, Mapping[str, float | None]]]
NAMES = {
    "reference": "the published module",
    "compiled": "torch.compile",
    "eager": "plain PyTorch, tuned",
    "ours": "fastadapters",
}
COLOURS = {"reference": "#c9ced6", "compiled": "#9aa5b5", "eager": "#6b7a90", "ours": "#e8590c"}
OPS = {
    "bottleneck": "Adapter of AdaptFormer",
    "multimodal": "Multi-Modal Adapter's head",
    "sequence_fusion": "Wander",
}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "fastadapters"
    return plt


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds * 1e3:.0f} ms"


def _draw(axes: Any, shown: Shown, size: float) -> None:
    """A group of bars for each row, one for each form."""
    height = 0.84 / len(NAMES)
    for i, (form, name) in enumerate(NAMES.items()):
        times = [times[form] for _, times in shown]
        whole = [times["reference"] or 1.0 for _, times in shown]
        values = [(t or 0.0) / w for t, w in zip(times, whole, strict=True)]
        where = [j + (i - 1.5) * height for j in range(len(shown))]
        drawn = axes.barh(where, values, height, label=name, color=COLOURS[form])
        axes.bar_label(drawn, [_ms(t) if t else "" for t in times], padding=3, fontsize=size)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_axisbelow(True)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time relative to the published module: shorter is better")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})


def bars(shown: Shown, machine: str, path: Path) -> None:
    """Every row."""
    figure, axes = _pyplot().subplots(figsize=(9, 1.2 + 0.55 * len(shown)), layout="constrained")
    _draw(axes, shown, 6)
    labels = [f"{row.workload}\n{row.direction}, {row.dtype}" for row, _ in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=7)
    axes.set_title(machine, fontsize=8)
    figure.legend(loc="outside lower right", ncols=len(NAMES), fontsize=7)
    _save(figure, path)


def speed(shown: Shown, machine: str, path: Path) -> None:
    """The training steps in float32 of the ops that have a published module: the first plot."""
    some = [
        (row, times)
        for row, times in shown
        if row.op in OPS and row.direction == "training step" and row.dtype == "float32"
    ]
    figure, axes = _pyplot().subplots(figsize=(8, 0.9 + 0.72 * len(some)), layout="constrained")
    _draw(axes, some, 7.5)
    workloads = [row.workload.partition(", D ")[0].replace(" AdaptFormer", "") for row, _ in some]
    labels = [f"{OPS[row.op]}\n{name}" for (row, _), name in zip(some, workloads, strict=True)]
    axes.set_yticks(range(len(some)), labels, fontsize=9)
    axes.set_title(f"One training step, float32, measured on {machine}", fontsize=9)
    figure.legend(loc="outside lower right", ncols=len(NAMES), fontsize=8, frameon=False)
    _save(figure, path)

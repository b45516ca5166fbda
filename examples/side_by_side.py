"""Trains two forms of a model on the same data, in turns, and draws what came out.

Every example ends here: losses, time and memory of the published module and of ours.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler, which counts the memory

import torch
from torch import Tensor

from benches.harness import peak_bytes

COLOURS = {"published": "#9aa5b5", "fastadapters": "#e8590c"}


class Form(NamedTuple):
    """One of the two: what is trained, and its loss in step i."""

    parameters: Iterable[Tensor]
    loss: Callable[[int], Tensor]


class Run(NamedTuple):
    losses: list[float]
    seconds: list[float]
    """of each step"""
    peak_bytes: int
    """of tensors that a forward and backward hold beyond those that were there before"""


def train(forms: dict[str, Form], steps: int, lr: float = 1e-3) -> dict[str, Run]:
    """A step of each form in turn, so that whatever else this machine does meets both."""
    optimizers, runs = {}, {}
    for name, form in forms.items():
        parameters = list(form.parameters)
        optimizers[name] = torch.optim.AdamW(parameters, lr=lr)
        peak = peak_bytes(lambda form=form: form.loss(0).backward(), "cpu")
        runs[name] = Run([], [], peak)
    for i in range(steps):
        for name, form in forms.items():
            start = time.perf_counter()
            optimizers[name].zero_grad()
            loss = form.loss(i)
            loss.backward()
            optimizers[name].step()
            runs[name].seconds.append(time.perf_counter() - start)
            runs[name].losses.append(loss.item())
    return runs


def draw(runs: dict[str, Run], title: str, path: Path) -> None:
    """Loss curves, the median time of a step, peak memory."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (curves, times, memory) = plt.subplots(
        1, 3, figsize=(11, 3.4), width_ratios=(2, 1, 1), layout="constrained"
    )
    for (name, run), style in zip(runs.items(), ((4.0, 0.6), (1.4, 1.0)), strict=True):
        width, alpha = style
        curves.plot(run.losses, label=name, color=COLOURS[name], lw=width, alpha=alpha)
    curves.set_xlabel("step")
    curves.set_ylabel("loss")
    curves.legend(frameon=False)
    for axes, what, values in (
        (times, "ms a step", [1e3 * statistics.median(r.seconds) for r in runs.values()]),
        (memory, "MiB of tensors, at most", [r.peak_bytes / 2**20 for r in runs.values()]),
    ):
        bars = axes.bar(list(runs), values, color=[COLOURS[name] for name in runs])
        axes.bar_label(bars, fmt="%.3g")
        axes.set_title(what, fontsize=10)
    for axes in (curves, times, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(runs: dict[str, Run], title: str, path: Path) -> None:
    """In words and as a picture."""
    print(title)
    for name, run in runs.items():
        ms = 1e3 * statistics.median(run.seconds)
        print(
            f"  {name:13} loss {run.losses[0]:.4f} to {run.losses[-1]:.4f}, {ms:.3g} ms a step, "
            f"peak {run.peak_bytes / 2**20:.3g} MiB of tensors"
        )
    pairs = zip(*(run.losses for run in runs.values()), strict=True)
    print(f"  losses at most {max(abs(a - b) for a, b in pairs):.1e} apart")
    draw(runs, title, path)
    print(f"  {path}")


def place(name: str) -> Path:
    """Where the command line wants the picture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("docs/examples") / f"{name}.png")
    out: Path = parser.parse_args().out
    return out

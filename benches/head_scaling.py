"""How the time of the multi-modal adapter's head grows with classes and with images.

python -m benches.head_scaling        draws docs/head.svg: one thread, CPU time, ours and eager
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastadapters

from . import test_multimodal
from .crossover import _thread_times
from .harness import stepper
from .report import ROOT
from .workloads import Multimodal

CLASSES, IMAGES = (25, 50, 100, 200, 397, 700, 1000), (8, 16, 32, 64, 128, 256)
FORMS = ("cpu", "eager")


def under(name: str, fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(**tensors: Tensor) -> Tensor:
        with fastadapters.backend(name):
            return fn(**tensors)

    return call


def times(workload: Multimodal) -> dict[tuple[str, str], float]:
    """Milliseconds by form and direction."""
    case = test_multimodal.case(workload, "cpu", torch.float32)
    cotangents = (torch.randn(workload.batch, workload.classes),)
    keys, candidates = [], []
    for form in FORMS:
        for direction, given in (("forward", None), ("training step", cotangents)):
            keys.append((form, direction))
            fn = under(form, case.candidates["ours"])
            candidates.append(stepper(fn, case.inputs, given))
    found = _thread_times(candidates, 1.0)
    return {key: 1e3 * seconds for key, seconds in zip(keys, found, strict=True)}


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    torch.set_num_threads(1)
    plt.rcParams["svg.hashsalt"] = "fastadapters"
    figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for row, masked in zip(axes, (False, True), strict=True):
        base = Multimodal("scaling", 397, 64, masked=masked)
        for axis, name, values in zip(row, ("classes", "batch"), (CLASSES, IMAGES), strict=True):
            measured = [times(base._replace(**{name: value})) for value in values]
            for form in FORMS:
                for direction, style in (("forward", "--"), ("training step", "-")):
                    line = [found[form, direction] for found in measured]
                    print(masked, name, form, direction, [round(ms, 2) for ms in line], flush=True)
                    axis.plot(values, line, style, marker=".", label=f"{form}, {direction}")
            fixed = "B 64" if name == "classes" else "C 397"
            axis.set_title(f"{'masked' if masked else 'additive'}, {fixed}", fontsize=9)
            axis.set_xlabel("C, classes" if name == "classes" else "B, images")
            axis.set_ylabel("ms of one core")
            axis.set_xscale("log")  # on both: what is linear has slope 1
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"D 512, E 128, R 32, float32, {torch.backends.cpu.get_cpu_capability()}")
    figure.savefig(ROOT / "docs" / "head.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()

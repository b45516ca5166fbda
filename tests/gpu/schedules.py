"""An op on the PTX machine, under several schedules."""

from __future__ import annotations

from collections.abc import Callable

import bottleneck_cases
import device
import torch
from bottleneck_cases import Case
from torch import Tensor


def same_under_schedules(
    name: str,
    arch: int,
    check: Callable[[], dict[str, Tensor]],
    run: Callable[[], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """What ``check`` gives: equal to the bit in ``run``, whatever order the warps go in."""
    first = len(name)
    with device.simulate(arch, first):
        expected = check()
    for seed in (first + 1, first + 2):
        with device.simulate(arch, seed):
            out = run()
        for key, t in expected.items():
            assert torch.equal(out[key], t), f"{name} {key}: schedule {seed} differs"
    return expected


def check_schedules(case: Case, backend: str, arch: int) -> dict[str, Tensor]:
    """The bottleneck op: right under the tolerance rule, too."""
    return same_under_schedules(
        str(case),
        arch,
        lambda: bottleneck_cases.check_backend(case, backend),
        lambda: bottleneck_cases.run(case, bottleneck_cases.inputs(case), backend),
    )

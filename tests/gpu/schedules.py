"""The bottleneck op on the PTX machine, under several schedules."""

from __future__ import annotations

import bottleneck_cases
import device
import torch
from bottleneck_cases import Case
from torch import Tensor


def check_schedules(case: Case, backend: str, arch: int) -> dict[str, Tensor]:
    """Right under the tolerance rule, and equal to the bit whatever order the warps go in."""
    first = len(str(case))
    with device.simulate(arch, first):
        expected = bottleneck_cases.check_backend(case, backend)
    for seed in (first + 1, first + 2):
        with device.simulate(arch, seed):
            out = bottleneck_cases.run(case, bottleneck_cases.inputs(case), backend)
        for name, t in expected.items():
            assert torch.equal(out[name], t), f"{case} {name}: schedule {seed} differs"
    return expected

"""An op on the PTX machine, under several schedules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

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


def missed(
    arch: int, name: str, run: Callable[[], dict[str, Tensor]], kinds: tuple[str, ...]
) -> set[str]:
    """Of which kinds of synchronisation in kernel ``name`` the loss of one is seen in ``run``.

    For kernels of a compiler that is generous with them: not each is needed.
    """
    with device.simulate(arch, 1) as simulation:
        expected = run()
    found: set[str] = set()
    for change, text in device.mutants(simulation.texts[name], name):
        kind = next((k for k in kinds if k in change and k not in found), None)
        if kind is None:
            continue
        try:
            with device.simulate(arch, 1, replace={name: text}):
                out = run()
            seen = any(not torch.equal(out[key], t) for key, t in expected.items())
        except device.Fault:
            seen = True
        if seen:
            found.add(kind)
    return found


def check_schedules(case: Case, backend: str, arch: int) -> dict[str, Tensor]:
    """The bottleneck op: right under the tolerance rule, too."""
    return same_under_schedules(
        str(case),
        arch,
        lambda: bottleneck_cases.check_backend(case, backend),
        lambda: bottleneck_cases.run(case, bottleneck_cases.inputs(case), backend),
    )


def unneeded(
    arch: int, name: str, runs: Sequence[Callable[[], Sequence[Tensor]]], instruction: str = ""
) -> list[str]:
    """Which synchronising instructions of kernel ``name`` can be deleted, one at a time, without a
    fault or another result in any of the runs, each under three schedules.

    instruction: of these alone.
    """
    with torch.no_grad(), device.simulate(arch):
        expected = [run() for run in runs]

    def is_caught(replace: dict[str, str]) -> bool:
        for seed, (run, results) in itertools.product(range(3), zip(runs, expected, strict=True)):
            try:
                with torch.no_grad(), device.simulate(arch, seed, replace):
                    if not all(map(torch.equal, run(), results)):
                        return True
            except device.Fault:
                return True
        return False

    return not_caught(arch, name, is_caught, instruction)


def not_caught(
    arch: int, name: str, is_caught: Callable[[dict[str, str]], bool], instruction: str = ""
) -> list[str]:
    """Of `unneeded`, where ``is_caught`` runs the PTX that it is given in a kernel's place."""
    assert not is_caught({})
    mutants = [m for m in device.mutants(device.cuda_ptx(name, arch), name) if instruction in m[0]]
    assert mutants
    return [what for what, text in mutants if not is_caught({name: text})]

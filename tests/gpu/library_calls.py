"""What an op has PyTorch's own operators do."""

from __future__ import annotations

from collections.abc import Callable

import torch

# They allocate, look, or make another view of what there is: nothing runs on a GPU.
WITHOUT_LAUNCH = {
    "alias", "as_strided", "chunk", "contiguous", "detach", "einsum", "empty", "empty_like",
    "empty_strided", "expand", "expand_as", "flatten", "lift_fresh", "movedim", "narrow",
    "new_empty", "numpy_T", "permute", "reshape", "resolve_conj", "result_type", "select", "set_",
    "slice", "split", "squeeze", "t", "to", "transpose", "unflatten", "unsqueeze", "view",
    "_reshape_alias", "_unsafe_view",
}  # fmt: skip


def library_launches(fn: Callable[[], object]) -> list[str]:
    """PyTorch's operators in ``fn`` that launch kernels on a GPU: products, copies, sums.

    Of those that call others, the others alone.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # which only the tests do
    with torch.profiler.profile(activities=activities) as profile:
        fn()
    torch.utils.deterministic.fill_uninitialized_memory = filled
    found, callers = [], set()
    for event in profile.events():
        name, caller = event.name.removeprefix("aten::"), event.cpu_parent
        if name == event.name or name in WITHOUT_LAUNCH:
            continue
        found.append((id(event), name))
        while caller is not None:
            callers.add(id(caller))
            caller = caller.cpu_parent
    return [name for event, name in found if event not in callers]

"""What an op has PyTorch's own operators do."""

from __future__ import annotations

from collections.abc import Callable

import torch

# They allocate, look, or make another view of what there is: nothing runs on a GPU.
WITHOUT_LAUNCH = {
    "alias", "as_strided", "contiguous", "detach", "empty", "empty_like", "empty_strided", "expand",
    "new_empty", "reshape", "select", "set_", "slice", "squeeze", "t", "to", "transpose",
    "unsqueeze", "view",
}  # fmt: skip


def library_launches(fn: Callable[[], object]) -> list[str]:
    """PyTorch's operators in ``fn`` that launch kernels on a GPU: products, copies, sums."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # which only the tests do
    with torch.profiler.profile(activities=activities) as profile:
        fn()
    torch.utils.deterministic.fill_uninitialized_memory = filled
    names = [event.name for event in profile.events()]
    called = [name.removeprefix("aten::") for name in names if name.startswith("aten::")]
    return [name for name in called if name not in WITHOUT_LAUNCH]

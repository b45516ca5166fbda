"""Memory that stays with the process, so that a large tensor costs page faults only once.

glibc's malloc returns every block of 32 MiB and more to the system when it is freed, and the next
one of that size is made of fresh pages, which cost several times what writing to them does.
"""

from __future__ import annotations

import ctypes
import os
import warnings

import torch

# Parameters of mallopt(3), and what they are set to: no block is mapped on its own, none is
# trimmed from the heap, and all threads share the one heap that can grow without end.
_SETTINGS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}
_PROBE_BYTES = 64 << 20


class _Mallinfo(ctypes.Structure):
    """What mallinfo(3) returns."""

    _fields_ = tuple(
        (name, ctypes.c_uint)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    )  # fmt: skip


def _set() -> str | None:
    """Set malloc up; None, or why that cannot be or does not help."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        return "this is not glibc"
    if not all(libc.mallopt(*setting) for setting in _SETTINGS.values()):
        return "mallopt refused"
    libc.mallinfo.restype = _Mallinfo
    before = libc.mallinfo().uordblks
    probe = torch.empty(_PROBE_BYTES, dtype=torch.uint8)
    taken = libc.mallinfo().uordblks - before
    del probe
    if taken % 2**32 < _PROBE_BYTES:
        return "PyTorch's memory does not come from glibc's malloc"
    return None


def keep_pages() -> bool:
    """Keep freed memory in the process, for whatever allocates: PyTorch as well as these ops.

    A freed tensor's pages serve the next one, instead of going back to the system and being asked
    for again. That speeds up all CPU code whose tensors have 32 MiB or more (below, glibc learns to
    keep pages by itself), eager code included, after about ten steps. In exchange the process
    holds its peak of memory until it ends, and gaps of several of its largest tensors
    (``ctypes.CDLL(None).malloc_trim(0)`` returns what is free). Call it once, before other threads
    are started; FASTADAPTERS_KEEP_PAGES=1 in the environment does it at import.

    Returns:
        Whether it took effect. It sets glibc's malloc (mallopt); elsewhere, and where another
        allocator has taken its place, nothing happens but a warning that says why.

    Examples:
        >>> import fastadapters
        >>> fastadapters.keep_pages()  # doctest: +SKIP
        True
    """
    problem = _set()
    if problem is not None:
        warnings.warn(f"fastadapters.keep_pages: no effect, {problem}", stacklevel=2)
    return problem is None


if os.environ.get("FASTADAPTERS_KEEP_PAGES", "0") != "0":
    keep_pages()

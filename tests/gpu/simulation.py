"""A run of kernels on the PTX machine, and what Triton's and CUDA's launches of them share."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from machine import Fault, Module, Report, library


@dataclasses.dataclass
class Simulation:
    """A `simulate` block: architecture, seed, and the reports of the launches so far."""

    arch: int
    seed: int
    replace: dict[str, str] = dataclasses.field(default_factory=dict)
    launches: list[Report] = dataclasses.field(default_factory=list)
    texts: dict[str, str] = dataclasses.field(default_factory=dict)  # PTX last run, by kernel
    # Of a CUDA launch: raised at the end, whatever its caller made of the error code.
    fault: Fault | None = None

    def total(self, name: str = "") -> Report:
        """The sum of the reports of kernels whose name contains `name`."""
        return sum((r for r in self.launches if name in r.name), Report())

    def launch(
        self, text: str, name: str, grid: Any, block: Any, shared: int, arguments: Any
    ) -> None:
        self.texts[name] = self.replace.get(name, text)
        module = load_module(self.texts[name])
        seed = self.seed * 1_000_003 + len(self.launches)
        self.launches.append(module.launch(name, grid, block, shared, arguments, seed))


_arena_users = 0


@contextlib.contextmanager
def arena() -> Iterator[None]:
    """torch's CPU allocator is the machine's own in this block: see device.py."""
    global _arena_users
    if _arena_users == 0:
        library.arena_install()
    _arena_users += 1
    try:
        yield
    finally:
        _arena_users -= 1
        if _arena_users == 0:
            library.arena_remove()


def shared_limit(arch: int) -> int:
    """The most shared memory of a block, opted in."""
    if arch == 80:
        return 166_912
    return 101_376 if arch < 90 or arch >= 120 else 232_448


@contextlib.contextmanager
def known(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Tells the machine of tensors that ordinary allocators made."""
    added = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and not library.heap_known(storage.data_ptr()):
            library.heap_add(storage.data_ptr(), storage.nbytes())
            added.append(storage.data_ptr())
    try:
        yield
    finally:
        for address in added:
            library.heap_remove(address)


def parameters(values: Sequence[bytes]) -> Any:
    """A C array of pointers to the values, as a launch takes them."""
    buffers = [ctypes.create_string_buffer(v, max(len(v), 8)) for v in values]
    array = (ctypes.c_void_p * len(buffers))(*map(ctypes.addressof, buffers))
    array.buffers = buffers  # kept alive with the array
    return array


@functools.lru_cache(maxsize=256)
def load_module(text: str) -> Module:
    return Module(text)


def ptx(
    text: str,
    name: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    *args: torch.Tensor | int | float | bytes,
    shared: int = 0,
    seed: int = 0,
) -> Report:
    """Runs kernel `name` of a PTX module.

    Arguments: tensors (for their pointer), integers, floats (as f32), or the bytes of a struct.
    """
    module = load_module(text)
    values = []
    for value, size in zip(args, module.parameters[name], strict=True):
        if isinstance(value, torch.Tensor):
            values.append(struct.pack("<Q", value.data_ptr()))
        elif isinstance(value, float):
            values.append(struct.pack("<f", value))
        else:
            given = isinstance(value, bytes)
            values.append(value if given else value.to_bytes(size, "little", signed=value < 0))
    with known([a for a in args if isinstance(a, torch.Tensor)]):
        return module.launch(name, grid, block, shared, parameters(values), seed)

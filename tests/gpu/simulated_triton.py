"""Triton's launches, run on the PTX machine."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from typing import Any

import torch
from machine import Fault
from simulation import Simulation, known, load_module, parameters, shared_limit


def _flat(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """(kind, value) of what a kernel argument is, a tuple or one value; none of a constant."""
    if isinstance(kind, tuple):
        for each in zip(kind, value, strict=True):
            yield from _flat(*each)
    elif kind != "constexpr":
        yield kind, value


def _pack(kind: str, value: Any) -> bytes:
    if kind.startswith("*"):
        return struct.pack("<Q", 0 if value is None else value.data_ptr())
    if kind in ("fp32", "fp64"):
        return struct.pack("<f" if kind == "fp32" else "<d", value)
    if kind[0] in "iu" and kind[1:].isdigit():
        bits = int(kind[1:])
        return (int(value) & ((1 << bits) - 1)).to_bytes(max(bits // 8, 1), "little")
    raise TypeError(f"a kernel argument of type {kind} is not supported")


def _run_triton(simulation: Simulation, kernel: Any, arguments: dict[str, Any], grid: Any) -> None:
    if callable(grid):
        grid = grid(arguments)
    metadata = kernel.metadata
    if metadata.global_scratch_size or metadata.num_ctas != 1:
        raise NotImplementedError("scratch memory and clusters")
    module = load_module(kernel.asm["ptx"])
    flat = [
        pair
        for name, kind in kernel.src.signature.items()
        for pair in _flat(kind, arguments.get(name))
    ]
    values = [_pack(*pair) for pair in flat]
    # Pointers to scratch memory, unused.
    hidden = len(module.parameters[metadata.name]) - len(values)
    tensors = [value for _, value in flat if isinstance(value, torch.Tensor)]
    limit = shared_limit(simulation.arch)
    if metadata.shared > limit:
        raise Fault(
            "launch",
            f"{metadata.name} needs {metadata.shared} bytes of shared memory of {limit}",
        )
    with known(tensors):
        block = (metadata.num_warps * 32,)
        simulation.launch(
            kernel.asm["ptx"],
            metadata.name,
            tuple(grid),
            block,
            metadata.shared,
            parameters([*values, *[bytes(8)] * hidden]),
        )


@contextlib.contextmanager
def triton_simulated(simulation: Simulation) -> Iterator[None]:
    """Makes kernel[grid](...) compile as on a GPU and run here."""
    try:
        from triton.backends.compiler import GPUTarget
        from triton.backends.driver import DriverBase
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return

    class Driver(DriverBase):
        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", simulation.arch, 32)

        def get_current_device(self) -> int:
            return simulation.arch  # kernels are cached by device

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_current_stream(self, device: int = 0) -> int:
            return 0

        def get_device_capability(self, *args: int) -> tuple[int, int]:
            return divmod(simulation.arch, 10)

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("autotuning")

        def map_python_to_cpp_type(self, kind: str) -> str:
            return kind

    compile_and_launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            own = {k: v for k, v in kwargs.items() if k in self.signature.parameters}
            bound = self.signature.bind(*args, **own)
            bound.apply_defaults()
            _run_triton(simulation, kernel, bound.arguments, grid)
        return kernel

    previous = driver._active
    driver.set_active(Driver())
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = compile_and_launch
        driver._active = previous

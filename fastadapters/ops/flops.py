"""How many FLOPs the ops do, for `torch.utils.flop_counter.FlopCounterMode`.

As PyTorch's own formulas, these count the products alone: 2 M D r for each of [M, D] with [D, r].
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from .bottleneck import PARAMETERS

_COUNTER = "torch.utils.flop_counter"
_BITS = {name: 1 << i for i, name in enumerate(("x", *PARAMETERS))}


def _any_of(needs: int, *names: str) -> bool:
    return any(needs & _BITS[name] for name in names)


def _gradients(rows: int, d: int, r: int, needs: int, has_z: bool) -> int:
    """FLOPs of the gradients whose bits are set in ``needs``, of one adapter on ``rows`` rows."""
    products = (
        not has_z and needs & ~_BITS["up_bias"] != 0,  # z again
        needs & ~(_BITS["up_weight"] | _BITS["up_bias"]) != 0,  # dy Wu
        _any_of(needs, "up_weight"),
        _any_of(needs, "down_weight"),
        _any_of(needs, "x", "norm_weight", "norm_bias"),  # dz Wd
    )
    return 2 * rows * d * r * sum(products)


def _bottleneck_forward(a: Mapping[str, Any]) -> int:
    r, d = a["down_weight"].shape
    return 4 * int(math.prod(a["x"].shape[:-1])) * int(d * r)


def _bottleneck_backward(a: Mapping[str, Any]) -> int:
    r, d = a["down_weight"].shape
    if "needs" in a:
        needs = a["needs"]
    else:
        given = {"x": a["dx"]} | {name: a[f"d_{name}"] for name in PARAMETERS}
        needs = sum(_BITS[name] for name, t in given.items() if t is not None)
    has_z = a["z"] is not None and a["z"].dim() == 2
    return _gradients(math.prod(a["dy"].shape[:-1]), d, r, needs, has_z)


def _multiway_sides(a: Mapping[str, Any], shape: Sequence[int]) -> list[tuple[int, int, int, str]]:
    """(rows, D, r, suffix of the names) of both adapters on x or dy of ``shape``."""
    items, tokens = math.prod(shape[:-2]), shape[-2]
    rows = items * a["split"], items * (tokens - a["split"])
    return [
        (n, *reversed(a[f"down_weight{suffix}"].shape), suffix)
        for n, suffix in zip(rows, ("_first", "_second"), strict=True)
    ]


def _multiway_forward(a: Mapping[str, Any]) -> int:
    return sum(4 * rows * d * r for rows, d, r, _ in _multiway_sides(a, a["x"].shape))


def _multiway_backward(a: Mapping[str, Any]) -> int:
    total, needs = 0, a["needs"]
    for i, (rows, d, r, suffix) in enumerate(_multiway_sides(a, a["dy"].shape)):
        of_side = needs >> len(PARAMETERS) * i & ~1 | needs & 1
        of_side &= (2 << len(PARAMETERS)) - 1
        total += _gradients(rows, d, r, of_side, a[f"z{suffix}"].dim() == 2)
    return total


_FORMULAS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "bottleneck_forward": _bottleneck_forward,
    "bottleneck_forward_out": _bottleneck_forward,
    "bottleneck_backward": _bottleneck_backward,
    "bottleneck_backward_out": _bottleneck_backward,
    "multiway_forward": _multiway_forward,
    "multiway_backward": _multiway_backward,
}


def _register(counter: ModuleType, namespaces: Sequence[str]) -> None:
    for namespace in namespaces:
        for name, formula in _FORMULAS.items():
            packet = getattr(getattr(torch.ops, namespace), name)
            names = [argument.name for argument in packet.default._schema.arguments]

            def count(
                *args: Any,
                out_val: Any = None,
                formula: Callable[[Mapping[str, Any]], int] = formula,
                names: Sequence[str] = names,
                **kwargs: Any,
            ) -> int:
                return formula({**dict(zip(names, args, strict=False)), **kwargs})

            counter.register_flop_formula(packet, get_raw=True)(count)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas when the counter is imported, which imports Triton: not before."""

    def __init__(self, namespaces: Sequence[str]) -> None:
        self.namespaces = namespaces

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register(module, self.namespaces)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register(*namespaces: str) -> None:
    """Let `FlopCounterMode` count the ops of these namespaces."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER], namespaces)
    else:
        sys.meta_path.insert(0, _WhenImported(namespaces))

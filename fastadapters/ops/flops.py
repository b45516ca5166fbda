"""How many FLOPs the ops do, for `torch.utils.flop_counter.FlopCounterMode`.

As PyTorch's own formulas, these count the products alone: 2 M D r for each of [M, D] with [D, r].
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"

# What an op counts, given its inputs by their names in the schema.
Formula = Callable[[Mapping[str, Any]], int]


def _register(
    counter: ModuleType, namespaces: Sequence[str], formulas: Mapping[str, Formula]
) -> None:
    for namespace in namespaces:
        for name, formula in formulas.items():
            packet = getattr(getattr(torch.ops, namespace), name)
            names = [argument.name for argument in packet.default._schema.arguments]

            def count(
                *args: Any,
                out_val: Any = None,
                formula: Formula = formula,
                names: Sequence[str] = names,
                **kwargs: Any,
            ) -> int:
                return formula({**dict(zip(names, args, strict=False)), **kwargs})

            counter.register_flop_formula(packet, get_raw=True)(count)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas when the counter is imported, which imports Triton: not before."""

    def __init__(self, namespaces: Sequence[str], formulas: Mapping[str, Formula]) -> None:
        self.namespaces, self.formulas = namespaces, formulas

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
            _register(module, self.namespaces, self.formulas)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register(namespaces: Sequence[str], formulas: Mapping[str, Formula]) -> None:
    """Let `FlopCounterMode` count the ops of these names in these namespaces."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER], namespaces, formulas)
    else:
        sys.meta_path.insert(0, _WhenImported(namespaces, formulas))

"""Declaring ops in a namespace, with the kernels that are there."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .._ops import add_op_namespace_prefix

# The namespaces of the kernels of the compiled library, and of those of the package `kernels`.
COMPILED = add_op_namespace_prefix("").removesuffix("::")
TRITON = f"{COMPILED}_triton"


def define(
    library: torch.library.Library,
    schemas: Mapping[str, str],
    fakes: Mapping[str, Callable[..., Any]],
) -> None:
    """Declare ops by their names, with what stands for their results while PyTorch traces."""
    for name, schema in schemas.items():
        library.define(name + schema)
        torch.library.register_fake(f"{library.ns}::{name}", fakes[name], lib=library)


def define_allow_tf32(library: torch.library.Library) -> None:
    """Tell the compiled kernels, which ask at each float32 call, what precision PyTorch allows."""
    library.define("allow_tf32() -> bool")
    library.impl(
        "allow_tf32",
        lambda: torch.get_float32_matmul_precision() != "highest",
        "CompositeExplicitAutograd",
    )


def implement_lazily(library: torch.library.Library, names: Iterable[str], module: str) -> None:
    """Make the ops the functions of their names in ``module``, imported at the first call.

    module: as it is called from here, such as "..kernels.bottleneck".
    """

    def implement(name: str) -> None:
        def kernel(*args: Any) -> Any:
            return getattr(importlib.import_module(module, __package__), name)(*args)

        library.impl(name, kernel, "CompositeExplicitAutograd")

    for name in names:
        implement(name)

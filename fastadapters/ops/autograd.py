"""Autograd formulas of the ops, in two forms.

Registered with the dispatcher they serve whatever traces: torch.compile, torch.export, opcheck. But
the dispatcher walks through the schema on every such call, which for some twenty arguments costs
0.1 ms. So an eager call goes through a `torch.autograd.Function` made of the same two functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_functions: dict[torch._ops.OpOverload, type[torch.autograd.Function]] = {}


def register(
    library: torch.library.Library,
    name: str,
    setup_context: Callable[..., None],
    backward: Callable[..., tuple[Any, ...]],
) -> None:
    """Differentiate op ``name`` of ``library`` by ``backward``, and ``name``'s gradient by none.

    The signatures are those of `torch.library.register_autograd`. The gradient is the op whose name
    has "backward" for "forward".
    """
    qualified = f"{library.ns}::{name}"
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=library)
    torch.library.register_autograd(
        qualified.replace("forward", "backward"), _refuse_double_backward, lib=library
    )
    op = getattr(getattr(torch.ops, library.ns), name).default

    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = below_autograd(op, *inputs)
        setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    _functions[op] = type(name, (torch.autograd.Function,), members)


def _refuse_double_backward(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "fastadapters: the fused backends cannot be differentiated twice; "
        'run the forward under fastadapters.backend("reference")'
    )


def below_autograd(op: torch._ops.OpOverload, *inputs: Any) -> Any:
    """The op without autograd's part of the dispatcher, unless that has something to say."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


def call(op: torch._ops.OpOverload, *inputs: Any, save: bool) -> Any:
    """The op; ``save``, its last argument, is whether it keeps what its gradient needs."""
    if torch.compiler.is_compiling():
        return op(*inputs, save)
    if save:
        return _functions[op].apply(*inputs, save)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs, save)

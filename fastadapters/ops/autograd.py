"""Autograd formulas of the ops, in two forms.

Registered with the dispatcher they serve whatever traces: torch.compile, torch.export, opcheck. But
the dispatcher walks through the schema on every such call, which for some twenty arguments costs
0.1 ms. So an eager call goes through a `torch.autograd.Function` made of the same two functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_functions: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {}


# Given which inputs need a gradient, the input tensors and the outputs: what the gradient op reads
# of all it takes (x, the other outputs, the other tensors but the residual).
Reads = Callable[[tuple[bool, ...], Sequence[Any], Sequence[Tensor]], Sequence[bool]]


def _save(
    ctx: Any,
    tensors: Sequence[Any],
    options: Sequence[Any],
    outputs: Sequence[Tensor],
    reads: Reads,
) -> None:
    """Save what is read, and of the rest the place, the shape and the dtype."""
    ctx.options = options[:-1]
    candidates = [tensors[0], *outputs[1:], *tensors[2:]]
    read = reads(ctx.needs_input_grad[: len(tensors)], tensors, outputs)
    absent = []
    for i, t in enumerate(candidates):
        if t is not None and not read[i]:
            absent.append((i, t.shape, t.dtype))
            candidates[i] = None
    ctx.absent = absent
    ctx.save_for_backward(*candidates)


def _saved(ctx: Any, dy: Tensor) -> Sequence[Any]:
    """What `_save` was given; what is not read is uninitialised, and x on the CPU empty."""
    if not ctx.absent:
        return ctx.saved_tensors  # type: ignore[no-any-return]
    saved = list(ctx.saved_tensors)
    for i, shape, dtype in ctx.absent:
        empty = i == 0 and dy.device.type == "cpu" and dy.numel() > 0
        saved[i] = dy.new_empty((0,) if empty else shape, dtype=dtype)
    return saved


def register(
    library: torch.library.Library,
    name: str,
    backward: Callable[[Any, Tensor], tuple[Tensor | None, ...]],
    reads: Reads,
) -> None:
    """Differentiate the first output of op ``name`` of ``library``, and its gradient not at all.

    The inputs of the op are tensors, x and residual first, then options, of which the last is
    whether to save for the gradient: the op whose name has "backward" for "forward", which takes
    x, the other outputs, the other tensors but the residual, and the options.

    Args:
        backward: (ctx, gradient of the first output) to a gradient or None per tensor; it calls
            `gradients`.
        reads: what to save for the gradients that are needed.
    """
    qualified = f"{library.ns}::{name}"
    op = getattr(getattr(torch.ops, library.ns), name).default
    n = sum("Tensor" in str(argument.type) for argument in op._schema.arguments)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        if not inputs[-1]:
            raise RuntimeError(f"{qualified}: save=True is needed for gradients")
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        _save(ctx, inputs[:n], inputs[n:], output, reads)

    def traced_backward(ctx: Any, dy: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        inputs = len(ctx.needs_input_grad)
        if dy is None:
            return (None,) * inputs
        return *backward(ctx, dy), *(None,) * (inputs - n)

    torch.library.register_autograd(
        qualified, traced_backward, setup_context=setup_context, lib=library
    )
    torch.library.register_autograd(
        qualified.replace("forward", "backward"), _refuse_double_backward, lib=library
    )

    def eager_forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, options = inputs
        with torch._C._AutoDispatchBelowAutograd():
            outputs = op(*tensors, *options)
        _save(ctx, tensors, options, outputs, reads)
        y: Tensor = outputs[0]
        return y

    def eager_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(ctx, dy), None

    members = {"forward": staticmethod(eager_forward), "backward": staticmethod(eager_backward)}
    function: type[torch.autograd.Function] = type(name, (torch.autograd.Function,), members)
    # Function.apply sees to torch.func, for a fifth of the call; `backends` already has.
    _functions[op] = super(torch.autograd.Function, function).apply  # type: ignore[misc]


def _refuse_double_backward(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "fastadapters: the fused backends cannot be differentiated twice; "
        'run the forward under fastadapters.backend("reference")'
    )


def gradients(
    op: torch._ops.OpOverload, ctx: Any, dy: Tensor, wanted: Sequence[bool]
) -> Sequence[Tensor | None]:
    """The outputs of gradient ``op`` that are wanted, which its last input is told bit by bit."""
    needs = sum([1 << i for i, want in enumerate(wanted) if want])
    if not needs:
        return (None,) * len(wanted)
    inputs = (dy, *_saved(ctx, dy), *ctx.options, needs)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        outputs = op(*inputs)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = op(*inputs)
    return [g if want else None for g, want in zip(outputs, wanted, strict=True)]


def call(op: torch._ops.OpOverload, tensors: Sequence[Any], options: tuple[Any, ...]) -> Tensor:
    """The first output of the op for these inputs; options end with whether to save."""
    if torch.compiler.is_compiling():
        y: Tensor = op(*tensors, *options)[0]
    elif options[-1]:
        y = _functions[op](*tensors, options)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            y = op(*tensors, *options)[0]
    return y

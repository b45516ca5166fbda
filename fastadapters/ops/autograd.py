"""Autograd formulas of the ops, in two forms.

Registered with the dispatcher they serve whatever traces: torch.compile, torch.export, opcheck. But
the dispatcher walks through the schema on every such call, which for some twenty arguments costs
0.1 ms. So an eager call goes through a `torch.autograd.Function` made of the same two functions.

An op takes tensors and lists of tensors, then options. A `torch.autograd.Function` knows no lists:
its tensors are laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_functions: dict[torch._ops.OpOverload, Callable[..., Any]] = {}


# Given which inputs need a gradient, the input tensors and the outputs: what the gradient op reads
# of all it takes (input tensors but the residual, the saved outputs among them).
Reads = Callable[[Any, Sequence[Any], Sequence[Tensor]], Sequence[Any]]


def _flat(values: Iterable[Any]) -> list[Any]:
    """What is in ``values`` and in the lists among them."""
    return [v for value in values for v in (value if isinstance(value, list) else (value,))]


def _nested(flat: Iterable[Any], sizes: Sequence[int | None]) -> list[Any]:
    """The inverse of `_flat`; sizes of the lists, None for what is in none."""
    rest = iter(flat)
    return [next(rest) if n is None else [next(rest) for _ in range(n)] for n in sizes]


def _sizes(values: Sequence[Any]) -> list[int | None]:
    return [len(v) if isinstance(v, list) else None for v in values]


class _Formula(NamedTuple):
    """What is particular to an op; see `register`."""

    reads: Reads | None
    results: int
    saved_at: int
    residual: bool
    """whether its second input is a residual, which no gradient reads"""
    lists: bool
    """whether there are lists among its inputs"""


def _save(
    ctx: Any,
    formula: _Formula,
    needs: Sequence[Any],
    tensors: Sequence[Any],
    options: Sequence[Any],
    outputs: Sequence[Tensor],
) -> None:
    """Save what is read, and of the rest the place, the shape and the dtype."""
    ctx.options = options[:-1]
    kept = [tensors[0], *tensors[1 + formula.residual :]]
    at = formula.saved_at
    candidates = [*kept[:at], *outputs[formula.results :], *kept[at:]]
    ctx.sizes = None
    if formula.lists:
        ctx.sizes = _sizes(candidates)
        candidates = _flat(candidates)
    absent = []
    if formula.reads is not None:
        read = formula.reads(needs, tensors, outputs)
        if formula.lists:
            read = _flat(read)
        for i, t in enumerate(candidates):
            if t is not None and not read[i]:
                absent.append((i, t.shape, t.dtype))
                candidates[i] = None
    ctx.absent = absent
    ctx.save_for_backward(*candidates)


def _saved(ctx: Any, dy: Tensor) -> Sequence[Any]:
    """What `_save` was given, for backward; what is not read is uninitialised.

    Of x that is not read the values take no memory: it is empty, in a list it is one row that all
    share.
    """
    saved = list(ctx.saved_tensors)
    listed = 0 if ctx.sizes is None else ctx.sizes[0] or 0
    for i, shape, dtype in ctx.absent:
        if i < listed:
            saved[i] = dy.new_empty(shape[-1:], dtype=dtype).expand(shape)
        else:
            empty = i == 0 and dy.numel() > 0
            saved[i] = dy.new_empty((0,) if empty else shape, dtype=dtype)
    return saved if ctx.sizes is None else _nested(saved, ctx.sizes)


def register(
    library: torch.library.Library,
    name: str,
    backward: Callable[..., tuple[Any, ...]],
    reads: Reads | None = None,
    results: int = 1,
    saved_at: int = 1,
) -> None:
    """Differentiate the first outputs of op ``name`` of ``library``, and its gradient not at all.

    The inputs of the op are tensors and lists of them, then options, of which the last is whether
    to save for the gradient: the op whose name has "backward" for "forward", which takes the
    gradients of the results, the tensors but the residual (the second input where it has that
    name), among them the other outputs, and the options.

    Args:
        backward: (ctx, which inputs need a gradient, gradient of each result) to a gradient, a list
            or None per tensor or list; it calls `gradients`.
        reads: what to save for the gradients that are needed; without it, everything.
        results: how many of the outputs are differentiable.
        saved_at: behind how many input tensors the gradient op takes the other outputs.
    """
    qualified = f"{library.ns}::{name}"
    op = getattr(getattr(torch.ops, library.ns), name).default
    arguments = op._schema.arguments
    n = sum("Tensor" in str(argument.type) for argument in arguments)
    lists = any("List" in str(argument.type) for argument in arguments)
    formula = _Formula(reads, results, saved_at, arguments[1].name == "residual", lists)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        if not inputs[-1]:
            raise RuntimeError(f"{qualified}: save=True is needed for gradients")
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[results:])
        # Here, unlike in the backward, PyTorch has the elements of lists one by one.
        needs = _nested(ctx.needs_input_grad, _sizes(inputs))
        _save(ctx, formula, needs[:n], inputs[:n], inputs[n:], output)

    def traced_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        inputs = len(ctx.needs_input_grad)
        if all(g is None for g in gradients[:results]):
            return (None,) * inputs
        needs = ctx.needs_input_grad[:n]
        return *backward(ctx, needs, *gradients[:results]), *(None,) * (inputs - n)

    torch.library.register_autograd(
        qualified, traced_backward, setup_context=setup_context, lib=library
    )
    torch.library.register_autograd(
        qualified.replace("forward", "backward"), _refuse_double_backward, lib=library
    )

    def eager_forward(ctx: Any, *inputs: Any) -> Any:
        *tensors, options = inputs
        if lists:
            sizes, options = options
            tensors = _nested(tensors, sizes)
            ctx.needs = _nested(ctx.needs_input_grad, sizes)
        else:
            ctx.needs = ctx.needs_input_grad[:-1]
        with torch._C._AutoDispatchBelowAutograd():
            outputs = op(*tensors, *options)
        _save(ctx, formula, ctx.needs, tensors, options, outputs)
        if results == 1:
            return outputs[0]
        ctx.set_materialize_grads(False)
        return tuple(outputs[:results])

    def eager_backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        wanted = backward(ctx, ctx.needs, *gradients)
        return *(_flat(wanted) if lists else wanted), None

    members = {"forward": staticmethod(eager_forward), "backward": staticmethod(eager_backward)}
    function: type[torch.autograd.Function] = type(name, (torch.autograd.Function,), members)
    # Function.apply sees to torch.func, for a fifth of the call; `backends` already has.
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    if lists:
        _functions[op] = lambda *inputs: apply(
            *_flat(inputs[:-1]), (_sizes(inputs[:-1]), inputs[-1])
        )
    else:
        _functions[op] = apply


def _refuse_double_backward(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "fastadapters: the fused backends cannot be differentiated twice; "
        'run the forward under fastadapters.backend("reference")'
    )


def gradients(
    op: torch._ops.OpOverload, ctx: Any, given: Sequence[Tensor | None], wanted: Sequence[bool]
) -> Sequence[Tensor | None]:
    """The outputs of gradient ``op`` that are wanted, which its last input is told bit by bit.

    given: the gradients of the results; all None behind hooks on a module, say, of whose results
    others are used.
    """
    needs = sum([1 << i for i, want in enumerate(wanted) if want])
    dy = next((g for g in given if g is not None), None)
    if not needs or dy is None:
        return (None,) * len(wanted)
    inputs = (*given, *_saved(ctx, dy), *ctx.options, needs)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        outputs = op(*inputs)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = op(*inputs)
    return [g if want else None for g, want in zip(outputs, wanted, strict=True)]


def call(
    op: torch._ops.OpOverload, tensors: Sequence[Any], options: tuple[Any, ...], results: int = 1
) -> Any:
    """The result of the op for these inputs, or the tuple of its results.

    options: their last is whether to save.
    """
    if torch.compiler.is_compiling():
        outputs = op(*tensors, *options)
    elif options[-1]:
        return _functions[op](*tensors, options)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = op(*tensors, *options)
    return outputs[0] if results == 1 else outputs[:results]

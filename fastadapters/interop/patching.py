"""Run the adapters of a model of somebody else's on our ops: `patch`, and its `Report`.

A module's class is set to a subclass that overrides forward alone. So its parameters, keys, hooks
and place in an optimizer stay.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from types import FunctionType, TracebackType
from typing import Any, NamedTuple

from torch import nn

from .trees import tree_hash

Forward = Callable[..., Any]


class Client(NamedTuple):
    """One class of a client's adapters."""

    name: str
    trees: frozenset[str]
    """hashes of the forwards that `override` replaces"""
    parts: frozenset[str]
    """attributes by which a module is taken for a relative, to be reported if it isn't replaced"""
    why_not: Callable[[nn.Module, nn.Module | None], str | None]
    """why this module, in that one (containers aside), is not replaced"""
    override: Callable[[Forward], Forward]
    """our forward, given the client's own for what ours doesn't do"""
    names: tuple[tuple[str, object], ...] = ()
    """what global names must mean in the forward"""


@functools.cache
def _clients() -> tuple[Client, ...]:
    from . import adapter_hub, adaptformer, clip_mma, enhancer, peft_lora

    modules = (adaptformer, enhancer, adapter_hub, peft_lora, clip_mma)
    return tuple(client for module in modules for client in module.CLIENTS)


_own_classes: dict[type, type] = {}


def own_class(kind: type) -> Any:
    """The client's class of a patched one, or of one derived from it; None of any other."""
    return next((_own_classes[k] for k in kind.__mro__ if k in _own_classes), None)


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    """A module is copied and pickled as the client's, and `_remake` patches what comes out."""
    kind, own = type(self), own_class(type(self))
    reduced = own.__reduce_ex__(self, protocol)
    if isinstance(reduced, str):
        return reduced
    make, args, *state = reduced
    args = tuple(own if a is kind else a for a in args)
    return (_remake, (own if make is kind else make, args), *state)


def _remake(make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """A module as the client's class makes it, patched; its own where that is another version."""
    module = make(*args)
    kind: Any = type(module)
    client = known_client(kind)
    if client is not None:
        module.__class__ = _patched_class(client, kind, kind.forward)
    return module


def known_client(kind: Any) -> Any:
    """The `Client` whose forward the class has, or None."""
    tree = tree_hash(kind.forward)
    for client in _clients():
        if tree in client.trees:
            scope = kind.forward.__globals__
            if all(scope.get(name) is value for name, value in client.names):
                return client
    return None


def client_of(module: nn.Module) -> Client | None:
    """The client of a module, patched or not."""
    kind = type(module)
    client: Client | None = known_client(own_class(kind) or kind)
    return client


@functools.cache
def _patched_class(client: Client, kind: Any, own: Forward) -> Any:
    forward = client.override(own)
    if not isinstance(forward, FunctionType) or not isinstance(own, FunctionType):
        raise TypeError(f"expected functions, got {forward} and {own}")
    # The arguments are named alike, the trees being equal; what they are by default is the class's.
    forward.__defaults__, forward.__kwdefaults__ = own.__defaults__, own.__kwdefaults__
    forward.__doc__ = own.__doc__
    names = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__reduce_ex__": _reduce_ex,
        "forward": forward,
    }
    patched = type(kind)(kind.__name__, (kind,), names)
    _own_classes[patched] = kind
    return patched


def _is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 has set the class."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _is_related(client: Client, module: nn.Module) -> bool:
    return all(p in module._modules or p in module.__dict__ for p in client.parts)


def _examine(module: nn.Module, holder: nn.Module | None) -> tuple[Client | None, str | None]:
    """(the client of a module, why it isn't patched); None for what is no adapter at all."""
    client = known_client(type(module))
    if client is None:
        client = next((c for c in _clients() if _is_related(c, module)), None)
        return client, "forward not known" if client is not None else None
    if "forward" in module.__dict__:
        return client, "forward is set on the module itself, not by its class"
    if _is_sharded(module):
        return client, "FSDP2 has set its class: patch before fully_shard"
    return client, client.why_not(module, holder)


class _Swap(NamedTuple):
    name: str
    module: nn.Module
    own: type[nn.Module]
    patched: type[nn.Module]


class Report:
    """What `patch` did to a model; as a context manager it undoes that at the end.

    Attributes:
        replaced: {name of the module: client}, of all modules that run our ops now.
        skipped: {name of the module: reason}, of adapters and what looks like one.
    """

    def __init__(self) -> None:
        self.replaced: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self._swaps: list[_Swap] = []

    def undo(self) -> None:
        """Give the modules that this call of `patch` replaced their own classes back.

        Raises:
            RuntimeError: something else has set a module's class or forward since then, as FSDP2
                does. Nothing is undone.
        """
        for swap in self._swaps:
            if type(swap.module) is not swap.patched or "forward" in swap.module.__dict__:
                what = "forward" if type(swap.module) is swap.patched else "class"
                raise RuntimeError(
                    f"undo: the {what} of {swap.name!r} was set by something else after patch (as "
                    "FSDP2's fully_shard and accelerate's hooks do): undo that first, in reverse "
                    "order"
                )
        for swap in self._swaps:
            swap.module.__class__ = swap.own
        for swap in self._swaps:
            self.replaced.pop(swap.name)
        self._swaps.clear()

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.skipped)} skipped"]
        lines += [f"  {name}: {client}" for name, client in self.replaced.items()]
        lines += [f"  {name}: skipped, {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def patch(model: nn.Module) -> Report:
    """Run the adapters in ``model`` on our ops, without a change to the code that built it.

    Adapters of AdaptFormer and its exact copies, MultiWay-Adapter, torchscale's feed-forward block,
    `adapters`, `peft` (LoRA) and clip-mma, known by what their forward computes. Each keeps its
    parameters, keys and hooks, so checkpoints, the client's own functions and an optimizer made
    before go on. Whatever is not computed as the client does is skipped. A module calls the
    client's own forward where its layers are more than plain Linears: LoRA inside, hooks, shards.

    Copies and pickles of a patched module are patched. Call it before `fully_shard` and before
    `torch.jit.script`; again after adding adapters. Modules that are patched already stay so.

    Args:
        model: changed in place: the class of its adapters.

    Raises:
        TypeError: ``model`` is no module.

    Warns:
        UserWarning: nothing was replaced.

    Examples:
        >>> import fastadapters, peft
        >>> model = nn.Sequential(nn.Linear(768, 768))
        >>> model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
        >>> report = fastadapters.patch(model)  # or: with fastadapters.patch(model): ...
        >>> report
        1 replaced, 0 skipped
          base_model.model.0: peft
        >>> report.undo()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    report = Report()
    modules = dict(model.named_modules())
    for name, module in modules.items():
        kind: Any = type(module)
        own = own_class(kind)
        if own is not None:
            report.replaced[name] = known_client(own).name
            continue
        client, reason = _examine(module, _holder(name, modules))
        if client is None:
            continue
        if reason is not None:
            report.skipped[name] = reason
            continue
        try:
            patched = _patched_class(client, kind, kind.forward)
        except Exception as error:  # of an __init_subclass__ or a metaclass
            report.skipped[name] = f"no class can be derived from its class: {error}"
            continue
        module.__class__ = patched
        report._swaps.append(_Swap(name, module, kind, patched))
        report.replaced[name] = client.name
    if not report.replaced:
        known = (
            f"; skipped: {report.skipped}" if report.skipped else ": there is no adapter we know"
        )
        warnings.warn(f"fastadapters.patch replaced nothing{known}", stacklevel=2)
    return report


def _holder(name: str, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The module that a module is in, lists and dicts of modules aside."""
    while name:
        name = name.rpartition(".")[0]
        holder = modules.get(name)
        if not isinstance(holder, (nn.ModuleList, nn.ModuleDict)):
            return holder
    return None

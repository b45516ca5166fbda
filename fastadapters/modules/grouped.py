"""Many adapters in one batch: of tasks, tenants or users, each item through its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .. import functional
from ..checks import check_choice, check_factory, check_list
from ..functional.shards import is_sharded
from ..options import Activation, Init, LearnableScale
from .bottleneck import BottleneckAdapter, residual_for

# Where a `BottleneckAdapter` has what is stacked here.
_KEYS = {
    "down_weight": "down_proj.weight",
    "up_weight": "up_proj.weight",
    "down_bias": "down_proj.bias",
    "up_bias": "up_proj.bias",
    "norm_weight": "adapter_layer_norm_before.weight",
    "norm_bias": "adapter_layer_norm_before.bias",
    "scale": "scale",
}


class GroupedAdapter(nn.Module):
    """`BottleneckAdapter`s by name, their parameters stacked; each item goes through its own.

    Args:
        dim, bottleneck: widths D and r of all adapters.
        names: the adapters there are from the beginning, in the order of their numbers.
        layernorm: None or "in".
        device, dtype and all others: as in `BottleneckAdapter`, for each.

    Parameters: ``down_weight`` [N, r, D], ``up_weight`` [N, D, r] and, where the options have them,
    ``down_bias`` [N, r], ``up_bias``, ``norm_weight``, ``norm_bias`` [N, D] and ``scale``, [N] or
    [N, D]. The names are part of the state dict, which loads into a module of the same adapters.
    `add` and `remove` make new parameters: an optimizer has to be made after them.

    Raises:
        TypeError, ValueError: naming the argument.

    Examples:
        >>> users = GroupedAdapter(768, 64, ["ann", "bob"], activation="gelu")
        >>> users.add("cid")
        >>> x = torch.randn(3, 197, 768)
        >>> users(x, users.index(["bob", "cid", "bob"])).shape
        torch.Size([3, 197, 768])
    """

    down_weight: nn.Parameter
    up_weight: nn.Parameter
    down_bias: nn.Parameter | None
    up_bias: nn.Parameter | None
    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None
    scale: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        bottleneck: int,
        names: Iterable[str] = (),
        *,
        activation: Activation = "relu",
        scale: float | LearnableScale = 1.0,
        dropout: float = 0.0,
        layernorm: Literal["in"] | None = None,
        residual: bool = True,
        bias: bool = True,
        init: Init = "lora",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_factory(device, dtype)
        check_choice("layernorm", layernorm, (None, "in"))
        self._make = partial(
            BottleneckAdapter, dim, bottleneck, activation=activation, scale=scale,
            dropout=dropout, layernorm=layernorm, residual=residual, bias=bias, init=init,
            device=device, dtype=dtype,
        )  # fmt: skip
        like = self._make(device="meta")
        self.activation, self.dropout = like.activation, like.dropout
        self.norm_eps, self.residual = like.norm_eps, like.residual
        self.number = 1.0 if isinstance(like.scale, Tensor) else like.scale
        self.names: tuple[str, ...] = ()
        state = like.state_dict()
        for name, key in _KEYS.items():
            stack = None
            if key in state:
                shape = (0, *(n for n in state[key].shape if name != "scale" or n > 1))
                stack = nn.Parameter(torch.empty(shape, device=device, dtype=state[key].dtype))
            self.register_parameter(name, stack)
        if isinstance(names, str):
            raise TypeError(f"names: expected a list of names, got {names!r}")
        for name in check_list("names", names, "a list of names"):
            self.add(name)

    def _stacks(self) -> dict[str, nn.Parameter]:
        """What `add` and the like take values from, and change."""
        stacks = {name: getattr(self, name) for name in _KEYS}
        for name, stack in stacks.items():
            if stack is not None and (not isinstance(stack, nn.Parameter) or is_sharded(stack)):
                raise TypeError(
                    f"{name}: expected a parameter, got a {type(stack).__name__}: undo pruning,"
                    " parametrization or sharding first"
                )
        return {name: stack for name, stack in stacks.items() if stack is not None}

    def _number(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(f"name: expected one of {', '.join(self.names)}, got {name!r}")
        return self.names.index(name)

    def _options(self) -> dict[str, Any]:
        """What all adapters compute alike, besides the eps of LayerNorm, as it is now."""
        options: dict[str, Any] = {"activation": self.activation, "residual": self.residual}
        if self.scale is None:
            options["scale"] = self.number
        return options

    def _new(self) -> BottleneckAdapter:
        """An adapter as the parameters and the options are now, not as they were at first."""
        like = self.down_weight
        adapter = self._make(
            device=like.device, dtype=like.dtype, dropout=self.dropout, **self._options()
        )
        if self.norm_weight is not None:
            adapter.adapter_layer_norm_before.eps = self.norm_eps
        return adapter

    def _values(self, adapter: BottleneckAdapter | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What an adapter has for each stack."""
        state = adapter.state_dict() if isinstance(adapter, nn.Module) else adapter
        wanted = {name: _KEYS[name] for name in self._stacks()}
        if set(state) != set(wanted.values()):
            raise ValueError(
                f"adapter: expected {', '.join(sorted(wanted.values()))},"
                f" got {', '.join(sorted(state))}"
            )
        if isinstance(adapter, BottleneckAdapter):
            for name, option in {**self._options(), "norm_eps": self.norm_eps}.items():
                given = getattr(adapter, name)
                if given != option:
                    raise ValueError(f"adapter: expected {name} {option!r}, got {given!r}")
        values = {}
        for name, stack in self._stacks().items():
            value, shape = state[_KEYS[name]], list(stack.shape[1:])
            if list(value.shape) != (shape or [1]):
                raise ValueError(
                    f"adapter: expected {_KEYS[name]} {shape or [1]}, got {list(value.shape)}"
                )
            values[name] = value.detach().reshape(stack.shape[1:]).to(stack)
        return values

    def add(
        self, name: str, adapter: BottleneckAdapter | Mapping[str, Tensor] | None = None
    ) -> None:
        """A further adapter, with the highest number: a new one, or a copy of one or of its state.

        An adapter must have the activation, scale, residual and eps of all others.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        if not isinstance(name, str):
            raise TypeError(f"name: expected a string, got {type(name).__name__}")
        if name in self.names:
            raise ValueError(f"name: expected another than {', '.join(self.names)}, got {name!r}")
        values = self._values(self._new() if adapter is None else adapter)
        for key, stack in self._stacks().items():
            joined = torch.cat([stack.detach(), values[key].unsqueeze(0)])
            self._parameters[key] = nn.Parameter(joined, stack.requires_grad)
        self.names += (name,)

    def remove(self, name: str) -> None:
        """Take an adapter away; those behind it get the next lower number."""
        n = self._number(name)
        for key, stack in self._stacks().items():
            rest = torch.cat([stack.detach()[:n], stack.detach()[n + 1 :]])
            self._parameters[key] = nn.Parameter(rest, stack.requires_grad)
        self.names = self.names[:n] + self.names[n + 1 :]

    def load(self, name: str, adapter: BottleneckAdapter | Mapping[str, Tensor]) -> None:
        """Copy the values of an adapter, or of its state dict, into that of this name."""
        n, values = self._number(name), self._values(adapter)
        with torch.no_grad():
            for key, stack in self._stacks().items():
                stack[n].copy_(values[key])

    def adapter(self, name: str) -> BottleneckAdapter:
        """A copy of one adapter, a module of its own whose state dict the published ones load."""
        n = self._number(name)
        adapter = self._new()
        state = {_KEYS[key]: stack.detach()[n] for key, stack in self._stacks().items()}
        if "scale" in state:
            state["scale"] = state["scale"].reshape(-1)
        adapter.load_state_dict(state)
        return adapter.train(self.training)

    def index(self, names: Iterable[str]) -> Tensor:
        """The numbers of adapters, one for each item, on the device of the parameters."""
        numbers = [self._number(name) for name in check_list("names", names, "a list of names")]
        return torch.tensor(numbers, dtype=torch.int64, device=self.down_weight.device)

    def reset_parameters(self) -> None:
        """Draw the initial parameters of all adapters again."""
        for name in self.names:
            self.load(name, self._new())

    def get_extra_state(self) -> Tensor:
        """The names, as the bytes of a JSON list."""
        names = list(json.dumps(self.names).encode())
        return torch.tensor(names, dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: which names a state dict has is looked at before it is loaded."""

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        names = state_dict.get(f"{prefix}_extra_state")
        if names is not None:
            # Cast or averaged with all else in the state dict they are numbers, but not integers.
            given = tuple(json.loads(bytes(map(round, names.tolist()))))
            if given != self.names:
                raise ValueError(
                    f"state_dict: expected the adapters {', '.join(self.names)},"
                    f" got {', '.join(given)}"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        x: Tensor,
        index: Tensor,
        residual: Tensor | None = None,
        add_residual: bool | None = None,
    ) -> Tensor:
        """Each item of x through the adapter of its number.

        Args:
            x: [B, ..., D].
            index: [B], or of further leading dimensions of x: int64 or int32, as `index` gives.
            residual, add_residual: as in `BottleneckAdapter`.
        """
        return functional.grouped_bottleneck(
            x,
            index,
            self.down_weight,
            self.up_weight,
            down_bias=self.down_bias,
            up_bias=self.up_bias,
            activation=self.activation,
            scale=self.number if self.scale is None else self.scale,
            residual=residual_for(x, residual, add_residual, self.residual),
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
            training=self.training,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        n, r, d = self.down_weight.shape
        return f"{n} x ({d}, {r}), names={self.names}, activation={self.activation!r}"

"""MultiWay-Adapter (arXiv 2309.01516): an adapter per modality, and the Alignment Enhancer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from .. import backends, functional
from ..checks import (
    check_choice,
    check_factory,
    check_flag,
    check_list,
    check_probability,
    check_residual,
    check_sizes,
    check_split,
    check_splits,
    check_tokens,
)
from ..ops.codes import ACTIVATION_CODES
from ..options import Activation, Init, LayerNormPlace, LearnableScale
from ..reference.bottleneck import ACTIVATIONS
from .bottleneck import BottleneckAdapter
from .layers import (
    as_leaf,
    check_input,
    keep_initial_values,
    like_an_op,
    why_all_called,
    why_called,
)


def _names(argument: str, given: Iterable[str]) -> tuple[str, ...]:
    expected = "different names, two or more"
    listed = [] if isinstance(given, str) else check_list(argument, given, expected)
    names = tuple(name for name in listed if isinstance(name, str) and name.isidentifier())
    if not 2 <= len(listed) == len(set(names)):
        raise ValueError(f"{argument}: expected {expected}, got {given!r}")
    return names


class MultiwayAdapter(nn.Module):
    """The New Knowledge Extractor: one `BottleneckAdapter` per modality on the tokens of one x.

    Args:
        dim, bottleneck: widths D and r of all adapters.
        modalities: two names or more, in the order of the modalities' tokens. The adapters are the
            submodules ``adaptmlp_<name>``, as in the published encoder layer. That one has two
            and crosses the names: it calls ``adaptmlp_text`` on images (``split`` -1) and
            ``adaptmlp_vision`` on texts (0). So its checkpoints want
            ``modalities=("text", "vision")``. It adds no residual by default (here:
            ``residual=False``) and runs no adapter for any other ``split``.
        device, dtype and all others: as in `BottleneckAdapter`, for each.

    Raises:
        TypeError, ValueError: naming the argument.

    Examples:
        >>> adapter = MultiwayAdapter(768, 64, activation="gelu", scale=0.1)
        >>> adapter(torch.randn(2, 197 + 52, 768), 197).shape  # 197 image tokens, then texts
        torch.Size([2, 249, 768])
    """

    def __init__(
        self,
        dim: int,
        bottleneck: int,
        *,
        modalities: tuple[str, ...] | list[str] = ("vision", "text"),
        activation: Activation = "relu",
        scale: float | LearnableScale = 1.0,
        dropout: float = 0.0,
        layernorm: LayerNormPlace | None = None,
        residual: bool = True,
        bias: bool = True,
        init: Init = "lora",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._add(
            {
                name: BottleneckAdapter(
                    dim, bottleneck, activation=activation, scale=scale, dropout=dropout,
                    layernorm=layernorm, residual=residual, bias=bias, init=init, device=device,
                    dtype=dtype,
                )
                for name in _names("modalities", modalities)
            }
        )  # fmt: skip

    @classmethod
    def from_modules(cls, modules: Mapping[str, nn.Module]) -> MultiwayAdapter:
        """An adapter per modality that shares layers and parameters with other adapters.

        Args:
            modules: {modality: adapter}, the first modality first; each as in
                `BottleneckAdapter.from_module`, or a `BottleneckAdapter`. For a layer of
                MultiWay-Adapter ``{"text": layer.adaptmlp_text, "vision": layer.adaptmlp_vision}``,
                the names being crossed there.

        Raises:
            ValueError: naming the modality whose module computes what no op does.

        Examples:
            >>> image, text = BottleneckAdapter(768, 64), BottleneckAdapter(768, 16)
            >>> adapter = MultiwayAdapter.from_modules({"vision": image, "text": text})
            >>> adapter.adaptmlp_text is text
            True
        """
        if not isinstance(modules, Mapping):
            raise TypeError(f"modules: expected a dict of modules, got {type(modules).__name__}")
        adapters: dict[str, BottleneckAdapter] = {}
        for name in _names("modules", modules):
            module = modules[name]
            if not isinstance(module, BottleneckAdapter):
                try:
                    module = BottleneckAdapter.from_module(module)
                except ValueError as error:
                    raise ValueError(f"modules[{name!r}]: {error}") from None
            adapters[name] = module
        multiway = cls.__new__(cls)
        nn.Module.__init__(multiway)
        multiway._add(adapters)
        multiway.training = any(adapter.training for adapter in adapters.values())
        return multiway

    def _add(self, adapters: dict[str, BottleneckAdapter]) -> None:
        self.modalities = tuple(adapters)
        for name, adapter in adapters.items():
            self.add_module(f"adaptmlp_{name}", adapter)

    def _adapters(self) -> list[BottleneckAdapter]:
        return [getattr(self, f"adaptmlp_{name}") for name in self.modalities]

    def reset_parameters(self) -> None:
        """Draw the initial parameters of all adapters again."""
        for adapter in self._adapters():
            adapter.reset_parameters()

    def _is_one_op(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether one op does what the adapters do, each called on its tokens."""
        adapters = self._adapters()
        if any(why_called("", adapter, BottleneckAdapter) for adapter in adapters):
            return False
        options = adapters[0].options()
        return all(
            adapter.why_called(x, residual) is None and adapter.options() == options
            for adapter in adapters
        )

    @overload
    def forward(
        self,
        x: Tensor,
        split: int,
        residual: Tensor | None = None,
        add_residual: bool | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        split: None = None,
        residual: Tensor | None = None,
        add_residual: bool | None = None,
        *,
        splits: Sequence[int],
    ) -> Tensor: ...

    def forward(
        self,
        x: Tensor,
        split: int | None = None,
        residual: Tensor | None = None,
        add_residual: bool | None = None,
        *,
        splits: Sequence[int] | None = None,
    ) -> Tensor:
        """The tokens of each modality through its adapter.

        Args:
            x: [B, T, D].
            split: of two modalities, the first has the first ``split`` tokens and the second the
                rest; -1 means all are of the first, 0 none (torchscale's convention).
            splits: in place of ``split``, with any number of modalities: where the tokens of each
                but the first begin, in order. A modality may have none.
            residual, add_residual: as in `BottleneckAdapter`.

        Returns:
            y [B, T, D].
        """
        if (split is None) == (splits is None):
            raise TypeError(f"split: expected it or splits, got {split} and {splits}")
        if splits is not None and not isinstance(x, Proxy):
            check_tokens(x)
            splits = check_splits("splits", splits, x.shape[-2], len(self.modalities))
        if splits is None and len(self.modalities) > 2:
            raise ValueError(
                f"split: expected splits, one per boundary of {self.modalities}, got {split}"
            )
        if not self._is_one_op(x, residual):
            leaf: Tensor | None = as_leaf(self, x, split, residual, add_residual, splits=splits)
            if leaf is not None:
                return leaf
            return self._call_adapters(x, split, splits, residual, add_residual)
        first, second, *others = self._adapters()
        residual = first.residual_for(x, residual, add_residual)
        after = first.layernorm == "out"
        if after:
            check_residual(residual, x)
        y = functional.multiway_bottleneck(
            x,
            split if splits is None else splits,  # type: ignore[arg-type]
            first.parameters_of(),
            second.parameters_of(),
            others=[adapter.parameters_of() for adapter in others],
            activation=first.activation,
            residual=None if after else residual,
            norm_eps=first.norm_eps,
            dropout=first.dropout,
            training=first.training,
        )
        if not after:
            return y
        parts = self._parts(y.shape[-2], split, splits)
        y = torch.cat([adapter.normalize(y[..., part, :]) for adapter, part in parts], dim=-2)
        return y if residual is None else y + residual

    if TYPE_CHECKING:
        __call__ = forward

    def _parts(
        self, tokens: int, split: int | None, splits: Sequence[int] | None
    ) -> list[tuple[BottleneckAdapter, slice]]:
        """Each adapter that has tokens, and which; the last, where there are none at all."""
        adapters = self._adapters()
        if splits is None:
            split = check_split(split, tokens)
            begins = [tokens if split == -1 else split]
        else:
            begins = check_splits("splits", splits, tokens, len(adapters))
        bounds = zip(adapters, [0, *begins], [*begins, tokens], strict=True)
        parts = [(adapter, slice(begin, end)) for adapter, begin, end in bounds if begin < end]
        return parts or [(adapters[-1], slice(0, tokens))]

    def _call_adapters(
        self,
        x: Tensor,
        split: int | None,
        splits: Sequence[int] | None,
        residual: Tensor | None,
        add_residual: bool | None,
    ) -> Tensor:
        """Each adapter called on its tokens; not at all where it has none.

        With what was given alone: whatever stands in an adapter's place has defaults of its own.
        """
        if not isinstance(x, Proxy):
            check_tokens(x)
        check_residual(residual, x)
        given: dict[str, Any] = {} if add_residual is None else {"add_residual": add_residual}
        ys: list[Tensor] = [
            adapter(x[..., part, :], **given)
            if residual is None
            else adapter(x[..., part, :], residual=residual[..., part, :], **given)
            for adapter, part in self._parts(x.shape[-2], split, splits)
        ]
        return ys[0] if len(ys) == 1 else torch.cat(ys, dim=-2)

    def extra_repr(self) -> str:
        return f"modalities={self.modalities}"


class AlignmentEnhancer(nn.Module):
    """A further feed-forward block behind the layer, torchscale's FeedForwardNetwork.

        y = x + drop_path(dropout(fc2(norm(activation(fc1(x))))))

    Its checkpoints load by name: ``fc1``, ``fc2`` and, with ``subln``, ``ffn_layernorm``.

    Args:
        dim: model width D.
        hidden_dim: width of the hidden layer.
        activation: as in `BottleneckAdapter`.
        dropout: probability of dropping an element of what ``fc2`` gives, in training.
        drop_path: probability of skipping the block for an item of the batch, in training; kept
            items are scaled by 1 / (1 - drop_path).
        subln: whether a LayerNorm precedes ``fc2``, as in BEiT-3. No fused kernel has one there.
        residual: whether x is added; the published network leaves that, and drop_path, to the layer
            around it.
        device, dtype: of the parameters.

    Shapes: x [B, ..., D] to the same.

    Raises:
        TypeError, ValueError: naming the argument.

    Examples:
        >>> enhancer = AlignmentEnhancer(768, 3072, drop_path=0.1)
        >>> enhancer(torch.randn(2, 197, 768)).shape
        torch.Size([2, 197, 768])
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        subln: bool = False,
        residual: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim, hidden_dim = check_sizes(dim=dim, hidden_dim=hidden_dim)
        check_choice("activation", activation, ACTIVATION_CODES)
        check_flag("subln", subln)
        check_flag("residual", residual)
        check_factory(device, dtype)
        self.activation = activation
        self.dropout = check_probability("dropout", dropout)
        self.drop_path = check_probability("drop_path", drop_path)
        self.residual = residual
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)
        self.ffn_layernorm = nn.LayerNorm(hidden_dim, device=device, dtype=dtype) if subln else None
        keep_initial_values(self)

    def reset_parameters(self) -> None:
        """Draw the initial parameters again, as `torch.nn.Linear` does."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()
        if self.ffn_layernorm is not None:
            self.ffn_layernorm.reset_parameters()
        keep_initial_values(self)

    def _why_called(self, x: Tensor) -> str | None:
        """Why the layers must be called on x; None where the op does all that they do."""
        if self.ffn_layernorm is not None:
            return "subln: no kernel has a LayerNorm between the projections"
        return why_all_called(x=x) or why_called("fc1", self.fc1) or why_called("fc2", self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """The block on x [B, ..., D]."""
        drops = self.training and (self.dropout > 0.0 or self.drop_path > 0.0)
        residual = x if self.residual else None
        reason = self._why_called(x)
        if reason is not None:
            leaf: Tensor | None = as_leaf(self, x)
            if leaf is not None:
                return leaf
            backends.call_layers("bottleneck", reason)
            y = like_an_op(x, lambda: self._call_layers(x))
        else:
            y = functional.bottleneck(
                x,
                self.fc1.weight,
                self.fc2.weight,
                down_bias=self.fc1.bias,
                up_bias=self.fc2.bias,
                activation=self.activation,
                residual=None if drops else residual,
            )
            if not drops:
                return y
        y = F.dropout(y, self.dropout, self.training)
        if self.training and self.drop_path > 0.0:
            items = y.new_ones(y.shape[0], *[1] * (y.dim() - 1))
            y = y * F.dropout(items, self.drop_path)
        return y if residual is None else residual + y

    if TYPE_CHECKING:
        __call__ = forward

    def _call_layers(self, x: Tensor) -> Tensor:
        check_input("x", x, self.fc1)
        h = ACTIVATIONS[self.activation](self.fc1(x))
        y: Tensor = self.fc2(h if self.ffn_layernorm is None else self.ffn_layernorm(h))
        return y

    def extra_repr(self) -> str:
        return (
            f"activation={self.activation!r}, dropout={self.dropout}, "
            f"drop_path={self.drop_path}, residual={self.residual}"
        )

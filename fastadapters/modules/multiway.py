"""MultiWay-Adapter (arXiv 2309.01516): an adapter per modality, and the Alignment Enhancer."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..checks import check_choice, check_probability, check_residual, check_sizes
from ..ops.bottleneck import ACTIVATION_CODES
from .bottleneck import BottleneckAdapter


class MultiwayAdapter(nn.Module):
    """The New Knowledge Extractor: one `BottleneckAdapter` per modality on the tokens of one x.

    Args:
        dim, bottleneck: widths D and r of both adapters.
        modalities: names of the first and of the second modality. The adapters are the submodules
            ``adaptmlp_<name>``, as in the published encoder layer.
        device, dtype and all others: as in `BottleneckAdapter`, for both.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        dim: int,
        bottleneck: int,
        *,
        modalities: tuple[str, str] = ("vision", "text"),
        **options: Any,
    ) -> None:
        super().__init__()
        names = () if isinstance(modalities, str) else tuple(modalities)
        if len(set(names)) != 2 or not all(isinstance(n, str) and n.isidentifier() for n in names):
            raise ValueError(f"modalities: expected two different names, got {modalities!r}")
        self.modalities = names
        for name in names:
            self.add_module(f"adaptmlp_{name}", BottleneckAdapter(dim, bottleneck, **options))

    def _adapters(self) -> tuple[BottleneckAdapter, BottleneckAdapter]:
        first, second = (cast(BottleneckAdapter, m) for m in self.children())
        return first, second

    def reset_parameters(self) -> None:
        """Draw the initial parameters of both adapters again."""
        for adapter in self._adapters():
            adapter.reset_parameters()

    def forward(self, x: Tensor, split: int, residual: Tensor | None = None) -> Tensor:
        """y [B, T, D]: the first ``split`` tokens through the first adapter, the rest the second.

        ``split`` -1 means all tokens are of the first modality, 0 none (torchscale's convention).
        ``residual`` [B, T, D] is added, else x if the adapters have a residual.
        """
        first, second = self._adapters()
        if residual is None and first.residual:
            residual = x
        after = first.layernorm == "out"
        if after:
            check_residual(residual, x)
        y = functional.multiway_bottleneck(
            x,
            split,
            first.parameters_of(),
            second.parameters_of(),
            activation=first.activation,
            residual=None if after else residual,
            norm_eps=first.norm_eps,
            dropout=first.dropout,
            training=self.training,
        )
        if not after:
            return y
        split = y.shape[-2] if split == -1 else split
        halves = (first.normalize(y[..., :split, :]), second.normalize(y[..., split:, :]))
        y = torch.cat(halves, dim=-2)
        return y if residual is None else y + residual.to(y.dtype)

    def extra_repr(self) -> str:
        return f"modalities={self.modalities}"


class AlignmentEnhancer(nn.Module):
    """A further feed-forward block behind the layer: x + drop_path(fc2(dropout(act(fc1(x))))).

    Args:
        dim: model width D.
        hidden_dim: width of the hidden layer.
        activation: as in `BottleneckAdapter`.
        dropout: probability of dropping an element of the hidden layer, in training.
        drop_path: probability of skipping the block for an item of the batch, in training; kept
            items are scaled by 1 / (1 - drop_path).
        device, dtype: of the parameters, ``fc1`` and ``fc2`` (torchscale's names).

    Shapes: x [B, ..., D] to the same.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: str = "gelu",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, hidden_dim=hidden_dim)
        check_choice("activation", activation, ACTIVATION_CODES)
        check_probability("dropout", dropout)
        check_probability("drop_path", drop_path)
        self.activation = activation
        self.dropout = dropout
        self.drop_path = drop_path
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the initial parameters again, as `torch.nn.Linear` does."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        drop_path = self.drop_path if self.training else 0.0
        y = functional.bottleneck(
            x,
            self.fc1.weight,
            self.fc2.weight,
            down_bias=self.fc1.bias,
            up_bias=self.fc2.bias,
            activation=self.activation,
            residual=x if drop_path == 0.0 else None,
            dropout=self.dropout,
            training=self.training,
        )
        if drop_path == 0.0:
            return y
        items = torch.ones(x.shape[0], *[1] * (x.dim() - 1), dtype=y.dtype, device=x.device)
        kept = F.dropout(items, drop_path)
        return x.to(y.dtype) + kept * y

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}, drop_path={self.drop_path}"

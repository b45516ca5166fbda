"""Wander (arXiv 2412.08979): low-rank fusion of any number of modalities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends, functional
from ..checks import check_activations, check_choice, check_sizes, check_tensor
from .layers import as_leaf, keep_initial_values, like_an_op, why_all_called, why_called

# How large the fused branch is at first, next to inputs of unit variance.
_INITIAL_STD = 0.01


class WanderAdapter(nn.Module):
    """Down-projects every modality, fuses them token- and feature-wise, adds the leading tokens.

    Checkpoints of the published module load by name: ``down.i``, ``factor_dim_list.i``
    [feature_rank, bottleneck, D], ``factor_t_list.i`` [time_rank, T_i, out_len].

    Args:
        dim: D, the width of every modality.
        seq_lens: the lengths T_m; M = len(seq_lens) modalities.
        bottleneck: the width after the down-projections.
        feature_rank: number of feature factors per modality.
        time_rank: number of time factors per modality.
        out_len: T_o, by default ``bottleneck``; at most the sum of the lengths.
        fusion: "summed" sums the factors over their ranks before the modalities are multiplied, as
            published; "cp" multiplies modality by modality within a rank and sums the products,
            which needs feature_rank == time_rank.
        init: "published" zeroes every time factor. From M = 2 modalities on, each gradient is a
            product with another modality's zero: nothing ever trains. "trainable" draws all
            factors so that the fused branch has a standard deviation of about 0.01 at first, spread
            evenly over the modalities: it starts near the identity and all gradients are alive.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: naming the option.
    """

    def __init__(
        self,
        dim: int,
        seq_lens: Sequence[int],
        bottleneck: int,
        *,
        feature_rank: int,
        time_rank: int,
        out_len: int | None = None,
        fusion: str = "summed",
        init: str = "trainable",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_len = bottleneck if out_len is None else out_len
        dim, bottleneck, feature_rank, time_rank, out_len, *lengths = check_sizes(
            dim=dim, bottleneck=bottleneck, feature_rank=feature_rank, time_rank=time_rank,
            out_len=out_len, **{f"seq_lens[{i}]": t for i, t in enumerate(seq_lens)},
        )  # fmt: skip
        check_choice("fusion", fusion, ("summed", "cp"))
        check_choice("init", init, ("trainable", "published"))
        if fusion == "cp" and feature_rank != time_rank:
            raise ValueError(
                f"time_rank: expected feature_rank = {feature_rank} with 'cp', got {time_rank}"
            )
        if out_len > sum(lengths):
            raise ValueError(
                f"out_len: expected at most {sum(lengths)} (all tokens), got {out_len}"
            )
        self.dim = dim
        self.seq_lens = tuple(lengths)
        self.out_len = out_len
        self.fusion = fusion
        self.init = init

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.down = nn.ModuleList(
            nn.Linear(dim, bottleneck, device=device, dtype=dtype) for _ in self.seq_lens
        )
        self.factor_dim_list = nn.ParameterList(
            empty(feature_rank, bottleneck, dim) for _ in self.seq_lens
        )
        self.factor_t_list = nn.ParameterList(empty(time_rank, t, out_len) for t in self.seq_lens)
        self.reset_parameters()

    def _downs(self) -> list[nn.Linear]:
        return cast("list[nn.Linear]", list(self.down))

    def reset_parameters(self) -> None:
        """Draw the initial parameters again."""
        for down, feature_factor, time_factor in zip(
            self._downs(), self.factor_dim_list, self.factor_t_list, strict=True
        ):
            if self.init == "published":
                down.reset_parameters()
                nn.init.normal_(feature_factor)
                nn.init.zeros_(time_factor)
                continue
            # h of unit second moment, then A^T h and its product with U of unit variance, times
            # the modality's share of the branch's size.
            nn.init.kaiming_normal_(down.weight, nonlinearity="relu")
            nn.init.zeros_(down.bias)
            feature_rank, bottleneck, _ = feature_factor.shape
            time_rank, n_tokens, _ = time_factor.shape
            ranks = feature_rank * time_rank if self.fusion == "summed" else 1
            products = 1 if self.fusion == "summed" else time_rank
            share = (_INITIAL_STD / products**0.5) ** (1 / len(self.seq_lens))
            nn.init.normal_(feature_factor, std=bottleneck**-0.5)
            nn.init.normal_(time_factor, std=share * (n_tokens * ranks) ** -0.5)
        keep_initial_values(self)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """M tensors [B, T_m, D] to [B, T_o, D]; what is fused is added to the first T_o tokens."""
        leaf: Tensor | None = as_leaf(self, inputs)
        if leaf is not None:
            return leaf
        if len(inputs) != len(self.seq_lens):
            raise ValueError(
                f"inputs: expected M = {len(self.seq_lens)} tensors [B, T_m, D], got {len(inputs)}"
            )
        for i, (x, length) in enumerate(zip(inputs, self.seq_lens, strict=True)):
            check_activations(f"inputs[{i}]", x, "[B, T, D]", 3)
            shape = (inputs[0].shape[0], length, self.dim)
            check_tensor(f"inputs[{i}]", x, "[B, T, D]", shape, inputs[0].device)
        time_factors, feature_factors = list(self.factor_t_list), list(self.factor_dim_list)
        reason = self._why_called(inputs)
        if self.fusion == "summed":
            time_factors = [factor.sum(dim=0, keepdim=True) for factor in time_factors]
            feature_factors = [factor.sum(dim=0, keepdim=True) for factor in feature_factors]
        if reason is not None:
            backends.call_layers("sequence_fusion", reason)
            residual = self._leading_tokens(inputs)
            return residual + self._call_layers(inputs, time_factors, feature_factors)
        return functional.sequence_fusion(
            inputs,
            [down.weight for down in self._downs()],
            [down.bias for down in self._downs()],
            time_factors,
            feature_factors,
            residual=self._leading_tokens(inputs),
        )

    def _why_called(self, inputs: Sequence[Tensor]) -> str | None:
        """Why the down-projections must be called; None where the op does all that they do."""
        groups = {
            "inputs": inputs,
            "factor_dim_list": self.factor_dim_list,
            "factor_t_list": self.factor_t_list,
        }
        reason = why_all_called(
            **{f"{name}[{i}]": t for name, group in groups.items() for i, t in enumerate(group)}
        )
        for i, down in enumerate(self.down):
            reason = reason or why_called(f"down.{i}", down)
        return reason

    def _call_layers(
        self, inputs: Sequence[Tensor], time_factors: list[Tensor], feature_factors: list[Tensor]
    ) -> Tensor:
        """What is added to the leading tokens, each down-projection called."""

        def branch() -> Tensor:
            product: Tensor | float = 1.0
            for x, down, a, u in zip(inputs, self.down, time_factors, feature_factors, strict=True):
                combined = torch.einsum("qto,btr->bqor", a, F.gelu(down(x)))
                product = product * torch.einsum("bqor,qrd->bqod", combined, u)
            return torch.as_tensor(product).sum(dim=1)

        return like_an_op(inputs[0], branch)

    def _leading_tokens(self, inputs: Sequence[Tensor]) -> Tensor:
        """The first T_o tokens of the modalities laid end to end; usually a view of the first."""
        leading, missing = [], self.out_len
        for x in inputs:
            leading.append(x[:, :missing])
            missing -= leading[-1].shape[1]
            if missing == 0:
                break
        return leading[0] if len(leading) == 1 else torch.cat(leading, dim=1)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, seq_lens={self.seq_lens}, out_len={self.out_len}, "
            f"fusion={self.fusion!r}, init={self.init!r}"
        )

"""Wander (arXiv 2412.08979): low-rank fusion of any number of modalities."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends, functional
from ..checks import (
    check_activations,
    check_choice,
    check_factory,
    check_fits,
    check_list,
    check_sizes,
)
from ..functional.sequence_fusion import stack_lengths
from ..options import Fusion, FusionInit, Leading
from ..reference.sequence_fusion import counted, leading_tokens
from .layers import (
    as_leaf,
    keep_initial_values,
    like_an_op,
    listed,
    why_all_called,
    why_called,
)

# How large the fused branch is at first, next to inputs of unit variance.
_INITIAL_STD = 0.01


class WanderAdapter(nn.Module):
    """Down-projects every modality, fuses them token- and feature-wise, adds the leading tokens.

    Checkpoints of the published module load by name: ``down.i``, ``factor_dim_list.i``
    [feature_rank, bottleneck, D], ``factor_t_list.i`` [time_rank, T_i, out_len].

    Args:
        dim: D, the width of every modality, or one for each: then D, the output's, is the first.
        seq_lens: the lengths T_m, at most; M = len(seq_lens) modalities.
        bottleneck: the width after the down-projections.
        feature_rank: number of feature factors per modality.
        time_rank: number of time factors per modality.
        out_len: T_o, by default ``bottleneck``; at most the sum of the lengths of the modalities in
            front that have width D.
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

    Examples:
        >>> adapter = WanderAdapter((40, 74, 35), (50, 375, 500), 16, feature_rank=4, time_rank=4)
        >>> text, audio = torch.randn(8, 50, 40), torch.randn(8, 375, 74)
        >>> adapter([text, audio, None]).shape  # video is missing
        torch.Size([8, 16, 40])
    """

    def __init__(
        self,
        dim: int | Sequence[int],
        seq_lens: Sequence[int],
        bottleneck: int,
        *,
        feature_rank: int,
        time_rank: int,
        out_len: int | None = None,
        fusion: Fusion = "summed",
        init: FusionInit = "trainable",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_len = bottleneck if out_len is None else out_len
        seq_lens = check_list("seq_lens", seq_lens, "a number for each modality")
        modalities = len(seq_lens)
        if modalities == 0:
            raise ValueError("seq_lens: expected at least one number, got none")
        given: dict[str, object] = {"dim": dim}
        if isinstance(dim, Sequence) and not isinstance(dim, str):
            if len(dim) != modalities:
                raise ValueError(f"dim: expected one number or M = {modalities}, got {len(dim)}")
            given = {f"dim[{i}]": d for i, d in enumerate(dim)}
        check_factory(device, dtype)
        bottleneck, feature_rank, time_rank, out_len, *sizes = check_sizes(
            bottleneck=bottleneck, feature_rank=feature_rank, time_rank=time_rank,
            out_len=out_len, **given, **{f"seq_lens[{i}]": t for i, t in enumerate(seq_lens)},
        )  # fmt: skip
        dims, lengths = sizes[: len(given)] * (modalities // len(given)), sizes[len(given) :]
        check_choice("fusion", fusion, get_args(Fusion))
        check_choice("init", init, get_args(FusionInit))
        if fusion == "cp" and feature_rank != time_rank:
            raise ValueError(
                f"time_rank: expected feature_rank = {feature_rank} with 'cp', got {time_rank}"
            )
        leading = list(takewhile(lambda size: size[0] == dims[0], zip(dims, lengths, strict=True)))
        most = sum(length for _, length in leading)
        if out_len > most:
            which = "all tokens" if len(leading) == modalities else f"tokens of width {dims[0]}"
            raise ValueError(f"out_len: expected at most {most} ({which}), got {out_len}")
        self.dim = dims[0]
        self.dims = tuple(dims)
        self.seq_lens = tuple(lengths)
        self.out_len = out_len
        self.fusion = fusion
        self.init = init

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.down = nn.ModuleList(
            nn.Linear(d, bottleneck, device=device, dtype=dtype) for d in self.dims
        )
        self.factor_dim_list = nn.ParameterList(
            empty(feature_rank, bottleneck, self.dim) for _ in self.seq_lens
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

    def forward(
        self,
        inputs: Sequence[Tensor | None],
        lengths: Sequence[Tensor | None] | Tensor | None = None,
    ) -> Tensor:
        """M tensors [B, T, D_m], T <= T_m, to [B, T_o, D].

        What is fused is added to the first T_o of all tokens of width D laid end to end, zeros
        where there are no more.

        Args:
            inputs: a missing modality's is None: its factor is left out of the product, and its
                parameters get no gradient.
            lengths: how many tokens of each item count, as in `functional.sequence_fusion`; those
                of a missing modality are not looked at.
        """
        leaf: Tensor | None = as_leaf(self, inputs, lengths)
        if leaf is not None:
            return leaf
        modalities = len(self.seq_lens)
        inputs = check_list("inputs", inputs, "tensors [B, T, D]")
        if len(inputs) != modalities:
            raise ValueError(
                f"inputs: expected M = {modalities} tensors [B, T_m, D], got {len(inputs)}"
            )
        there = [(i, x) for i, x in enumerate(inputs) if x is not None]
        if not there:
            raise ValueError("inputs: expected at least one tensor, got None for all")
        first = there[0][1]
        for i, x in there:
            check_activations(f"inputs[{i}]", x, "[B, T, D]", 3)
            shape = (first.shape[0], min(x.shape[1], self.seq_lens[i]), self.dims[i])
            check_fits(f"inputs[{i}]", x, "[B, T, D]", shape, first.device)
        if lengths is not None:
            if isinstance(lengths, Tensor) and lengths.dim() != 2:
                raise ValueError(f"lengths: expected [M, B], got {list(lengths.shape)}")
            if not isinstance(lengths, Tensor):
                lengths = check_list("lengths", lengths, "tensors [B] or None")
            if len(lengths) != modalities:
                raise ValueError(f"lengths: expected M = {modalities}, got {len(lengths)}")
            if len(there) < modalities:
                lengths = [lengths[i] for i, _ in there]
        places, xs = [i for i, _ in there], [x for _, x in there]
        counts = stack_lengths(xs, lengths)
        residual = self._residual(xs, counts)
        downs: list[Any] = [*self.down]
        times, features = listed(self.factor_t_list), listed(self.factor_dim_list)
        if len(places) < modalities:
            downs, times, features = ([g[i] for i in places] for g in (downs, times, features))
        reason = why_all_called(
            inputs=dict(there),
            factor_dim_list=dict(zip(places, features, strict=True)),
            factor_t_list=dict(zip(places, times, strict=True)),
        )
        for i, down in zip(places, downs, strict=True):
            reason = reason or why_called(f"down.{i}", down)
        if reason is not None:
            backends.call_layers("sequence_fusion", reason)
            if isinstance(residual, str):
                residual = leading_tokens(xs, self.out_len, counts)
            fused = self._call_layers(xs, downs, times, features, counts)
            return fused if residual is None else residual + fused
        return functional.sequence_fusion(
            xs,
            [down._parameters["weight"] for down in downs],
            [down._parameters["bias"] for down in downs],
            times,
            features,
            residual=residual,
            lengths=counts,
            fusion=self.fusion,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def _residual(self, inputs: list[Tensor], lengths: Tensor | None) -> Tensor | Leading | None:
        """The leading tokens, as `functional.sequence_fusion` takes a residual.

        Where the op does not lay them end to end itself, for widths differ or there are too few.
        """
        leading = list(takewhile(lambda x: x.shape[2] == self.dim, inputs))
        enough = sum(x.shape[1] for x in leading) >= self.out_len
        if enough and (lengths is None or len(leading) == len(inputs)):
            return "leading"
        if not leading:
            return None
        n_items = inputs[0].shape[0]
        zeros = inputs[0].new_zeros(n_items, self.out_len, self.dim)
        if lengths is not None:
            behind = lengths.new_full((1, n_items), self.out_len)
            lengths = torch.cat([lengths[: len(leading)], behind])
        return leading_tokens([*leading, zeros], self.out_len, lengths)

    def _call_layers(
        self,
        inputs: list[Tensor],
        downs: list[nn.Linear],
        times: list[Tensor],
        features: list[Tensor],
        lengths: Tensor | None,
    ) -> Tensor:
        """What is added to the leading tokens, each down-projection called."""

        def branch() -> Tensor:
            factors = []
            for n, (x, down, a, u) in enumerate(zip(inputs, downs, times, features, strict=True)):
                a = a[:, : x.shape[1]]
                if self.fusion == "summed":
                    a, u = a.sum(dim=0, keepdim=True), u.sum(dim=0, keepdim=True)
                mask = None if lengths is None else counted(x.shape[1], lengths[n])
                h = F.gelu(down(x if mask is None else torch.where(mask, x, 0.0)))
                if mask is not None:
                    h = torch.where(mask, h, 0.0)
                combined = torch.einsum("qto,btr->bqor", a, h)
                factors.append(torch.einsum("bqor,qrd->bqod", combined, u))
            return functools.reduce(torch.mul, factors).sum(dim=1)

        return like_an_op(inputs[0], branch)

    def extra_repr(self) -> str:
        dim = self.dim if len({*self.dims}) == 1 else self.dims
        return (
            f"dim={dim}, seq_lens={self.seq_lens}, out_len={self.out_len}, "
            f"fusion={self.fusion!r}, init={self.init!r}"
        )

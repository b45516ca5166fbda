"""The adapter bottleneck in as few passes over memory as plain PyTorch calls allow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import transformed
from ..options import Activation
from ..reference.bottleneck import ACTIVATIONS
from ..reference.philox import drop, input_stream


def up_project(
    h: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    scale: float | Tensor,
    residual: Tensor | None,
) -> Tensor:
    """residual + scale * (h Wu^T + bu) for h [M, r], residual [M, D_out]; one fresh tensor.

    The scale moves into the small factors, unless it wants a gradient that is more exact than 16
    bit: as a product over all rows that would be one long chain of additions, so there it is
    applied last. On the CPU in 16 bit the bias becomes one more column of h, which leaves the
    GEMM's own accumulation into a copy of the residual; in float32 its width r + 1 costs more in
    backward than it saves, and the residual is added in place. Not under `torch.func`, which may
    have batched the residual alone.
    """
    narrow = h.dtype in (torch.bfloat16, torch.float16)
    if isinstance(scale, Tensor) and scale.requires_grad and not narrow:
        y = F.linear(h, up_weight, up_bias) * scale
        return y if residual is None else residual + y
    per_row = scale.reshape(-1, 1) if isinstance(scale, Tensor) else scale
    up_weight = up_weight * per_row
    bias = None if up_bias is None else up_bias * scale
    if residual is None:
        return F.linear(h, up_weight, bias)
    if residual.dtype != h.dtype:
        return residual + F.linear(h, up_weight, bias)
    if bias is None or h.device.type != "cpu" or not narrow:
        y = F.linear(h, up_weight, bias)
        return y + residual if transformed() else y.add_(residual)
    weight_and_bias = torch.cat([up_weight, bias.unsqueeze(1)], dim=1)
    return torch.addmm(residual, F.pad(h, (0, 1), value=1.0), weight_and_bias.T)


def bottleneck(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: Activation = "relu",
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    dropout: float = 0.0,
    input_dropout: float = 0.0,
    seed: Tensor | None = None,
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Same arguments and result as `fastadapters.reference.bottleneck`.

    masks: what norm(x) [..., D_in] and h [M, r] are multiplied with, where the caller has drawn it;
        then there is no ``seed``, and no probability.
    """
    (r, d_in), d_out = down_weight.shape, up_weight.shape[0]
    x_in = x
    if norm_weight is not None:
        x_in = F.layer_norm(x, (d_in,), norm_weight, norm_bias, norm_eps)
    x_in = drop(x_in, input_dropout, None if seed is None else input_stream(seed))
    x_in = x_in if masks[0] is None else x_in * masks[0]
    x_in = x_in if compute_dtype is None else x_in.to(compute_dtype)
    h = ACTIVATIONS[activation](F.linear(x_in, down_weight, down_bias)).reshape(-1, r)
    h = drop(h, dropout, seed)
    h = h if masks[1] is None else h * masks[1]
    residual = None if residual is None else residual.reshape(-1, d_out)
    y = up_project(h, up_weight, up_bias, scale, residual)
    return y.reshape(*x.shape[:-1], d_out)

"""Multi-Modal Adapter (arXiv 2409.02958): attention between class texts and images for CLIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..checks import check_bias, check_choice, check_number, check_sizes
from ..reference.cross_modal_attention import MASKED, Bias, Layer

_MASKS: dict[str, Bias] = {"masked": MASKED, "additive": ((0.0, 1.0), (1.0, 0.0))}


def _layers(module: nn.Module) -> list[Layer]:
    return [(m.weight, m.bias) for m in module.modules() if isinstance(m, nn.Linear)]


class MultiModalAdapter(nn.Module):
    """Attention over [class texts ; image] in a down-sampled space, blended into CLIP's features.

    Checkpoints of the published module load by name: ``downsampler``, ``mha``, ``upsampler``.

    Args:
        dim: D, the width of the text and image features.
        attn_dim: E, the width in which attention is computed.
        num_heads: H, a divisor of E.
        downsample: "linear", "factored" (two linear layers) or "mlp" (two with a GELU between).
        upsample: "linear" or "mlp" (two layers with a GELU between).
        hidden_dim: the width between two layers.
        mask: "masked" (each modality sees only the other, as in the paper), "additive" (+1 across
            modalities, as the authors' code computes) or ((text-text, text-image), (image-text,
            image-image)), numbers that are added to the scores.
        blend: the adapter's share in `logits`.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: naming the option.
    """

    def __init__(
        self,
        dim: int = 512,
        attn_dim: int = 128,
        num_heads: int = 4,
        *,
        downsample: str = "linear",
        upsample: str = "linear",
        hidden_dim: int = 32,
        mask: str | Bias = "masked",
        blend: float = 0.2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, attn_dim=attn_dim, num_heads=num_heads, hidden_dim=hidden_dim)
        check_number("blend", blend)
        if attn_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of {attn_dim}, got {num_heads}")
        if isinstance(mask, str) and mask not in _MASKS:
            raise ValueError(f"mask: expected 'masked', 'additive' or 2 x 2 numbers, got {mask!r}")
        if not isinstance(mask, str):
            check_bias("mask", mask)
        self.num_heads = num_heads
        self.bias = _MASKS[mask] if isinstance(mask, str) else mask
        self.blend = blend
        self.down_activation = "gelu" if downsample == "mlp" else "identity"

        def linear(n_in: int, n_out: int) -> nn.Linear:
            return nn.Linear(n_in, n_out, device=device, dtype=dtype)

        def build(name: str, kind: str, kinds: tuple[str, ...], n_in: int, n_out: int) -> nn.Module:
            check_choice(name, kind, kinds)
            if kind == "linear":
                return linear(n_in, n_out)
            between = [nn.GELU()] if kind == "mlp" else []
            return nn.Sequential(linear(n_in, hidden_dim), *between, linear(hidden_dim, n_out))

        self.downsampler = build(
            "downsample", downsample, ("linear", "factored", "mlp"), dim, attn_dim
        )
        # Holds its four parameters under the published names; it is never called.
        self.mha = nn.MultiheadAttention(attn_dim, num_heads, device=device, dtype=dtype)
        self.upsampler = build("upsample", upsample, ("linear", "mlp"), attn_dim, dim)

    def reset_parameters(self) -> None:
        """Draw the initial parameters again, as `torch.nn.Linear` and `MultiheadAttention` do."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        self.mha._reset_parameters()

    def _arguments(self) -> dict[str, Any]:
        mha = self.mha
        return {
            "down": _layers(self.downsampler),
            "in_proj": (mha.in_proj_weight, mha.in_proj_bias),
            "out_proj": (mha.out_proj.weight, mha.out_proj.bias),
            "up": _layers(self.upsampler),
            "num_heads": self.num_heads,
            "bias": self.bias,
            "down_activation": self.down_activation,
        }

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """text [C, D] (or one set per item [B, C, D]) and image [B, D] to [B, C, D] and [B, D]."""
        return functional.multimodal_features(text, image, **self._arguments())

    def forward_sequence(self, tokens: Tensor) -> Tensor:
        """tokens [C + 1, B, D], texts first and one image last, to the same: the published call."""
        if tokens.dim() != 3 or tokens.shape[0] < 2:
            raise ValueError(f"tokens: expected [C + 1, B, D], C >= 1, got {list(tokens.shape)}")
        text, image = self(tokens[:-1].transpose(0, 1), tokens[-1])
        return torch.cat([text.transpose(0, 1), image[None]])

    def logits(
        self, text: Tensor, image: Tensor, logit_scale: float | Tensor, *, adapt: str = "both"
    ) -> Tensor:
        """Class logits [B, C] of image [B, D] and text [C, D], see `functional.multimodal_logits`.

        ``logit_scale`` is the factor itself (CLIP stores its logarithm). ``adapt``: "both", "text"
        or "image".
        """
        return functional.multimodal_logits(
            text, image, logit_scale=logit_scale, blend=self.blend, adapt=adapt, **self._arguments()
        )

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, bias={self.bias}, blend={self.blend}"

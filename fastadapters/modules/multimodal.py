"""Multi-Modal Adapter (arXiv 2409.02958): attention between class texts and images for CLIP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args, overload

import torch
from torch import Tensor, nn

from .. import backends, functional
from ..checks import (
    check_bias,
    check_choice,
    check_factory,
    check_floats,
    check_number,
    check_sizes,
)
from ..functional.multimodal import check_features, check_logits
from ..options import Adapt, Downsampler, Mask, Upsampler
from ..reference.cross_modal_attention import MASKED, Bias
from ..reference.multimodal import Layer, blended_logits
from .layers import (
    as_leaf,
    check_input,
    keep_initial_values,
    like_an_op,
    why_all_called,
    why_attention_called,
    why_called,
)

_MASKS: dict[Mask, Bias] = {"masked": MASKED, "additive": ((0.0, 1.0), (1.0, 0.0))}


# What a sampler may consist of for the op to know what it does.
_DOWNSAMPLERS = ((nn.Linear,), (nn.Linear, nn.Linear), (nn.Linear, nn.GELU, nn.Linear))
_UPSAMPLERS = ((nn.Linear,), (nn.Linear, nn.GELU, nn.Linear))


def _stack(sampler: nn.Module) -> list[nn.Module]:
    return list(sampler) if isinstance(sampler, nn.Sequential) else [sampler]


def _parameters(sampler: nn.Module) -> list[Layer]:
    each: list[dict[str, Any]] = [
        m._parameters for m in _stack(sampler) if isinstance(m, nn.Linear)
    ]
    return [(own["weight"], own["bias"]) for own in each]


def _why_sampler_called(
    name: str, sampler: nn.Module, known: Sequence[Sequence[type[nn.Module]]]
) -> str | None:
    stack = _stack(sampler)
    if stack[0] is not sampler and (reason := why_called(name, sampler, nn.Sequential)):
        return reason
    for kinds in known:
        if len(kinds) == len(stack):
            for i, (layer, kind) in enumerate(zip(stack, kinds, strict=True)):
                at = name if layer is sampler else f"{name}.{i}"
                if reason := why_called(at, layer, kind):
                    return reason
                if (
                    layer._parameters["bias"] is None
                    if isinstance(layer, nn.Linear)
                    else layer.approximate != "none"
                ):
                    return f"{at} is {layer}: it is called"
            return None
    return f"{name} has {len(stack)} layers: they are called"


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

    Examples:
        >>> adapter = MultiModalAdapter(512, upsample="mlp")
        >>> text, image = torch.randn(100, 512), torch.randn(8, 512)  # CLIP's features
        >>> new_text, new_image = adapter(text, image)
        >>> new_text.shape, new_image.shape
        (torch.Size([8, 100, 512]), torch.Size([8, 512]))
        >>> adapter.logits(text, image, logit_scale=100.0).shape
        torch.Size([8, 100])
    """

    def __init__(
        self,
        dim: int = 512,
        attn_dim: int = 128,
        num_heads: int = 4,
        *,
        downsample: Downsampler = "linear",
        upsample: Upsampler = "linear",
        hidden_dim: int = 32,
        mask: Mask | Bias = "masked",
        blend: float = 0.2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim, attn_dim, num_heads, hidden_dim = check_sizes(
            dim=dim, attn_dim=attn_dim, num_heads=num_heads, hidden_dim=hidden_dim
        )
        if attn_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of {attn_dim}, got {num_heads}")
        if isinstance(mask, str) and mask not in _MASKS:
            raise ValueError(f"mask: expected 'masked', 'additive' or 2 x 2 numbers, got {mask!r}")
        check_factory(device, dtype)
        self.num_heads = num_heads
        self.bias = _MASKS[mask] if isinstance(mask, str) else check_bias("mask", mask)
        self.blend = check_number("blend", blend)

        def linear(n_in: int, n_out: int) -> nn.Linear:
            return nn.Linear(n_in, n_out, device=device, dtype=dtype)

        def build(name: str, kind: str, kinds: tuple[str, ...], n_in: int, n_out: int) -> nn.Module:
            check_choice(name, kind, kinds)
            if kind == "linear":
                return linear(n_in, n_out)
            between = [nn.GELU()] if kind == "mlp" else []
            return nn.Sequential(linear(n_in, hidden_dim), *between, linear(hidden_dim, n_out))

        self.downsampler = build("downsample", downsample, get_args(Downsampler), dim, attn_dim)
        # Holds its four parameters under the published names; see `_why_called`.
        self.mha = nn.MultiheadAttention(attn_dim, num_heads, device=device, dtype=dtype)
        self.upsampler = build("upsample", upsample, get_args(Upsampler), attn_dim, dim)
        keep_initial_values(self)

    def reset_parameters(self) -> None:
        """Draw the initial parameters again, as `torch.nn.Linear` and `MultiheadAttention` do."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        self.mha._reset_parameters()
        keep_initial_values(self)

    def _why_called(self, text: Tensor, image: Tensor) -> str | None:
        """Why the layers must be called; None where the op does all that they do."""
        return (
            why_all_called(text=text, image=image)
            or _why_sampler_called("downsampler", self.downsampler, _DOWNSAMPLERS)
            or why_attention_called("mha", self.mha)
            or _why_sampler_called("upsampler", self.upsampler, _UPSAMPLERS)
        )

    def _arguments(self) -> dict[str, Any]:
        mha, downsampler = self.mha, self.downsampler
        own: dict[str, Any] = mha._parameters
        out: dict[str, Any] = mha.out_proj._parameters
        return {
            "layers": functional.MultiModalLayers(
                down=_parameters(downsampler),
                in_proj=(own["in_proj_weight"], own["in_proj_bias"]),
                out_proj=(out["weight"], out["bias"]),
                up=_parameters(self.upsampler),
            ),
            "num_heads": mha.num_heads,
            "bias": self.bias,
            "down_activation": "gelu" if len(_stack(downsampler)) == 3 else "identity",
        }

    def _call_layers(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """The published forward pass: its layers on tokens [C + 1, B, D], with a mask."""
        check_features(text, image)
        check_input("image", image, _stack(self.downsampler)[0])
        texts = text.transpose(0, 1) if text.dim() == 3 else text[:, None]
        texts = texts.to(image.dtype).expand(-1, image.shape[0], -1)

        def branch() -> Tensor:
            x = self.downsampler(torch.cat([texts, image[None]]))
            modality = (torch.arange(len(x), device=x.device) == len(x) - 1).long()
            bias = torch.tensor(self.bias, dtype=x.dtype, device=x.device)
            mask = bias[modality[:, None], modality]
            blind = any(max(row) == -math.inf for row in self.bias)
            if blind:  # attention to nothing, NaN to PyTorch, is 0 here: it leaves a constant
                sees = (mask > -math.inf).any(dim=1)[:, None]
                mask = torch.where(sees, mask, 0.0)
            out = self.mha(x, x, x, attn_mask=mask, need_weights=False)[0]
            if blind:
                constant = self.mha.out_proj.bias
                out = torch.where(sees[:, None], out, 0.0 if constant is None else constant)
            y: Tensor = self.upsampler(out)
            return y

        y = like_an_op(image, branch)
        return y[:-1].transpose(0, 1), y[-1]

    def _features(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` gives, the texts maybe as an expanded view."""
        reason = self._why_called(text, image)
        if reason is None:
            return functional.multimodal_features(text, image, **self._arguments())
        backends.call_layers("cross_modal_attention", reason)
        return self._call_layers(text, image)

    @overload
    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(self, text: Tensor) -> Tensor: ...

    def forward(self, text: Tensor, image: Tensor | None = None) -> tuple[Tensor, Tensor] | Tensor:
        """The adapted features, before they are blended: the published call, or texts and images.

        Args:
            text: class texts [C, D], or one set per item [B, C, D]. Alone, it is the published
                module's one argument: tokens [C + 1, B, D], the texts and one image last.
            image: [B, D].

        Returns:
            [B, C, D] and [B, D]; of tokens [C + 1, B, D].
        """
        leaf: tuple[Tensor, Tensor] | Tensor | None = as_leaf(self, text, image)
        if leaf is not None:
            return leaf
        if image is not None:
            new_text, new_image = self._features(text, image)
            return new_text.contiguous(), new_image
        check_floats("text", text, "[C + 1, B, D]")
        if text.dim() != 3 or text.shape[0] < 2:
            raise ValueError(
                f"text: expected tokens [C + 1, B, D] without image, got {list(text.shape)}"
            )
        new_text, new_image = self._features(text[:-1].transpose(0, 1), text[-1])
        return torch.cat([new_text.transpose(0, 1), new_image[None]])

    if TYPE_CHECKING:
        __call__ = forward

    def logits(
        self, text: Tensor, image: Tensor, logit_scale: float | Tensor, *, adapt: Adapt = "both"
    ) -> Tensor:
        """Class logits [B, C] of image [B, D] and text [C, D], see `functional.multimodal_logits`.

        ``logit_scale`` is the factor itself (CLIP stores its logarithm). ``adapt``: "both", "text"
        or "image".

        Examples:
            >>> text, image = torch.randn(100, 512), torch.randn(8, 512)
            >>> MultiModalAdapter(512).logits(text, image, 100.0, adapt="image").shape
            torch.Size([8, 100])
        """
        reason = self._why_called(text, image)
        if reason is None:
            return functional.multimodal_logits(
                text, image, logit_scale=logit_scale, blend=self.blend, adapt=adapt,
                **self._arguments(),
            )  # fmt: skip
        backends.call_layers("multimodal", reason)
        new_text, new_image = self._call_layers(text, image)
        check_logits(text, logit_scale, adapt)
        logits = blended_logits(
            text.to(image.dtype), image, new_text, new_image,
            logit_scale=logit_scale, blend=self.blend, adapt=adapt,
        )  # fmt: skip
        return logits.to(new_image.dtype)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, bias={self.bias}, blend={self.blend}"

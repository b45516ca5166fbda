"""Other people's adapters on our ops as layers of Hugging Face's `kernels`.

A layer is a forward for modules of another class, whose attributes it reads; the class's own
forward runs what no op computes. `fastadapters.patch` does the same without `kernels`, and finds
the modules by itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .interop import adaptformer, enhancer, peft_lora

__all__ = ["AdaptFormerAdapter", "FeedForwardNetwork", "LoraLinear", "MultiWayAdapter"]


class AdaptFormerAdapter(nn.Module):
    """For the `Adapter` of AdaptFormer: x [..., D] to [..., D]."""

    can_torch_compile: bool = True

    def forward(
        self, x: Tensor, add_residual: bool = True, residual: Tensor | None = None
    ) -> Tensor:
        y: Tensor = adaptformer.override(type(self).forward)(self, x, add_residual, residual)
        return y


class MultiWayAdapter(nn.Module):
    """For the `Adapter` of MultiWay-Adapter, which adds no residual by default."""

    can_torch_compile: bool = True

    def forward(
        self, x: Tensor, add_residual: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        y: Tensor = adaptformer.override(type(self).forward)(self, x, add_residual, residual)
        return y


class FeedForwardNetwork(nn.Module):
    """For the `FeedForwardNetwork` of torchscale, MultiWay-Adapter's Alignment Enhancer."""

    can_torch_compile: bool = True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = enhancer.override(type(self).forward)(self, x)
        return y


class LoraLinear(nn.Module):
    """For peft's LoRA around an `nn.Linear`."""

    can_torch_compile: bool = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = peft_lora.override(type(self).forward)(self, x, *args, **kwargs)
        return y

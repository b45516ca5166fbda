"""The multi-modal adapter's head in Triton: features to logits, and back."""

from .backward import multimodal_logits_backward
from .forward import multimodal_logits_forward

__all__ = ["multimodal_logits_backward", "multimodal_logits_forward"]

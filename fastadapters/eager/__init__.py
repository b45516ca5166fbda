"""The best that plain PyTorch calls can do: the fallback, and the baseline to beat."""

from .bottleneck import bottleneck
from .cross_modal_attention import cross_modal_attention
from .grouped import grouped_bottleneck
from .multimodal import multimodal_features, multimodal_logits
from .sequence_fusion import sequence_fusion

__all__ = [
    "bottleneck",
    "cross_modal_attention",
    "grouped_bottleneck",
    "multimodal_features",
    "multimodal_logits",
    "sequence_fusion",
]

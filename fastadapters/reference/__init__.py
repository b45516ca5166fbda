"""The ops as plain, naive PyTorch: the definition that every backend is compared with."""

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

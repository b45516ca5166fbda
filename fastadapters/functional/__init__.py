"""The ops as pure functions: arguments are checked, a backend chosen, nothing ever written to."""

from ..reference.multimodal import MultiModalLayers
from .bottleneck import BottleneckParameters, bottleneck
from .cross_modal_attention import cross_modal_attention
from .grouped import grouped_bottleneck
from .multimodal import multimodal_features, multimodal_logits
from .multiway import multiway_bottleneck
from .sequence_fusion import sequence_fusion

__all__ = [
    "BottleneckParameters",
    "MultiModalLayers",
    "bottleneck",
    "cross_modal_attention",
    "grouped_bottleneck",
    "multimodal_features",
    "multimodal_logits",
    "multiway_bottleneck",
    "sequence_fusion",
]

"""Drop-in modules for the published adapters, under their published parameter names."""

from .bottleneck import BottleneckAdapter
from .grouped import GroupedAdapter
from .multimodal import MultiModalAdapter
from .multiway import AlignmentEnhancer, MultiwayAdapter
from .wander import WanderAdapter

__all__ = [
    "AlignmentEnhancer",
    "BottleneckAdapter",
    "GroupedAdapter",
    "MultiModalAdapter",
    "MultiwayAdapter",
    "WanderAdapter",
]

"""Fused kernels and drop-in modules for small adapters in large frozen multimodal models."""

from . import functional, layers
from .backends import backend, explain
from .interop import patch
from .modules import (
    AlignmentEnhancer,
    BottleneckAdapter,
    GroupedAdapter,
    MultiModalAdapter,
    MultiwayAdapter,
    WanderAdapter,
)
from .pages import keep_pages

__version__ = "0.1.0"

__all__ = [
    "AlignmentEnhancer",
    "BottleneckAdapter",
    "GroupedAdapter",
    "MultiModalAdapter",
    "MultiwayAdapter",
    "WanderAdapter",
    "backend",
    "explain",
    "functional",
    "keep_pages",
    "layers",
    "patch",
]

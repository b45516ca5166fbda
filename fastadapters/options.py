"""The words that options take, as types: a type checker refuses all others."""

from typing import Literal, TypeAlias

Activation: TypeAlias = Literal["identity", "relu", "gelu", "gelu_tanh", "silu", "quick_gelu"]
BackendName: TypeAlias = Literal["auto", "reference", "eager", "cpu", "triton", "cuda"]

Init: TypeAlias = Literal["lora", "houlsby", "bert"]
LayerNormPlace: TypeAlias = Literal["in", "out"]
LearnableScale: TypeAlias = Literal["learnable", "channel"]

Adapt: TypeAlias = Literal["both", "text", "image"]
Outputs: TypeAlias = Literal["both", "text", "image"]
Mask: TypeAlias = Literal["masked", "additive"]
Downsampler: TypeAlias = Literal["linear", "factored", "mlp"]
Upsampler: TypeAlias = Literal["linear", "mlp"]

Fusion: TypeAlias = Literal["cp", "summed"]
Leading: TypeAlias = Literal["leading"]
FusionInit: TypeAlias = Literal["trainable", "published"]

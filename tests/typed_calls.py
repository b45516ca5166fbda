"""Calls that mypy must take or refuse: `make lint` checks them, and each needless ignore fails.

The only test of types there is: nothing here is ever run.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fastadapters
from fastadapters import functional
from fastadapters.backends import Decision
from fastadapters.functional import BottleneckParameters, bottleneck, cross_modal_attention


def right(x: Tensor, qkv: tuple[Tensor, Tensor, Tensor], layer: tuple[Tensor, Tensor]) -> None:
    assert_type(bottleneck(x, x, x, activation="silu", scale=1), Tensor)
    assert_type(cross_modal_attention(*qkv, *qkv), tuple[Tensor, Tensor])
    assert_type(cross_modal_attention(*qkv, *qkv, outputs="both"), tuple[Tensor, Tensor])
    assert_type(cross_modal_attention(*qkv, *qkv, outputs="text", scale=2.0), Tensor)
    assert_type(functional.sequence_fusion([x], [x], [None], [x], [x], residual="leading"), Tensor)
    side = BottleneckParameters(x, x)
    assert_type(functional.multiway_bottleneck(x, 2, side, side), Tensor)
    layers = functional.MultiModalLayers([layer], layer, layer, [layer])
    features = functional.multimodal_features(x, x, layers, num_heads=4)
    assert_type(features, tuple[Tensor, Tensor])

    adapter = fastadapters.BottleneckAdapter(8, 4, layernorm="in", scale="learnable")
    assert_type(adapter(x, add_residual=False), Tensor)
    multiway = fastadapters.MultiwayAdapter(8, 4, activation="gelu", dtype=torch.bfloat16)
    assert_type(multiway(x, 3), Tensor)
    assert_type(fastadapters.AlignmentEnhancer(8, 32)(x), Tensor)
    head = fastadapters.MultiModalAdapter(mask=((0, 1), (1, 0)), downsample="mlp")
    assert_type(head(x, x), tuple[Tensor, Tensor])
    assert_type(head(x), Tensor)
    assert_type(head.logits(x, x, 100.0, adapt="image"), Tensor)
    wander = fastadapters.WanderAdapter(40, (50, 50), 8, feature_rank=4, time_rank=4)
    assert_type(wander([x, None], lengths=[None, x]), Tensor)
    with fastadapters.backend("eager"):
        assert_type(fastadapters.explain(adapter, x), list[Decision])
    assert_type(fastadapters.patch(nn.Linear(1, 1)).replaced, dict[str, str])
    assert_type(fastadapters.keep_pages(), bool)


def words(x: Tensor, qkv: tuple[Tensor, Tensor, Tensor], layer: tuple[Tensor, Tensor]) -> None:
    bottleneck(x, x, x, activation="swish")  # type: ignore[arg-type]
    functional.sequence_fusion([x], [x], [x], [x], [x], activation="swish")  # type: ignore[arg-type]
    functional.sequence_fusion([x], [x], [x], [x], [x], fusion="sum")  # type: ignore[arg-type]
    functional.sequence_fusion([x], [x], [x], [x], [x], residual="first")  # type: ignore[arg-type]
    side = BottleneckParameters(x, x)
    functional.multiway_bottleneck(x, 2, side, side, activation="swish")  # type: ignore[arg-type]
    cross_modal_attention(*qkv, *qkv, outputs="texts")  # type: ignore[call-overload]
    layers = functional.MultiModalLayers([layer], layer, layer, [layer])
    functional.multimodal_logits(
        x, x, layers, num_heads=4, logit_scale=1.0,
        adapt="none",  # type: ignore[arg-type]
        down_activation="swish",  # type: ignore[arg-type]
    )  # fmt: skip
    fastadapters.BottleneckAdapter(8, 4, activation="swish")  # type: ignore[arg-type]
    fastadapters.BottleneckAdapter(8, 4, layernorm="before")  # type: ignore[arg-type]
    fastadapters.BottleneckAdapter(8, 4, scale="each")  # type: ignore[arg-type]
    fastadapters.BottleneckAdapter(8, 4, init="zeros")  # type: ignore[arg-type]
    fastadapters.MultiwayAdapter(8, 4, init="zeros")  # type: ignore[arg-type]
    fastadapters.AlignmentEnhancer(8, 32, activation="swish")  # type: ignore[arg-type]
    fastadapters.MultiModalAdapter(mask="causal")  # type: ignore[arg-type]
    fastadapters.MultiModalAdapter(downsample="conv")  # type: ignore[arg-type]
    fastadapters.MultiModalAdapter(upsample="factored")  # type: ignore[arg-type]
    fastadapters.MultiModalAdapter().logits(x, x, 1.0, adapt="none")  # type: ignore[arg-type]
    fastadapters.WanderAdapter(8, [4], 2, feature_rank=1, time_rank=1, fusion="sum")  # type: ignore[arg-type]
    fastadapters.WanderAdapter(8, [4], 2, feature_rank=1, time_rank=1, init="lora")  # type: ignore[arg-type]
    fastadapters.backend("gpu")  # type: ignore[arg-type]


def arguments(x: Tensor, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    bottleneck(x, x)  # type: ignore[call-arg]
    bottleneck(x, x, x, x)  # type: ignore[call-arg]
    bottleneck(x, x, x, eps=1e-5)  # type: ignore[call-arg]
    bottleneck(x, None, x)  # type: ignore[arg-type]
    bottleneck(x, x, x, scale="learnable")  # type: ignore[arg-type]
    bottleneck(x, x, x, training="yes")  # type: ignore[arg-type]
    cross_modal_attention(*qkv, *qkv).sum()  # type: ignore[attr-defined]
    functional.sequence_fusion([None], [x], [x], [x], [x])  # type: ignore[list-item]
    fastadapters.BottleneckAdapter(8, "4")  # type: ignore[arg-type]
    fastadapters.BottleneckAdapter(8, 4, droput=0.1)  # type: ignore[call-arg]
    fastadapters.MultiwayAdapter(8, 4, droput=0.1)  # type: ignore[call-arg]
    fastadapters.MultiwayAdapter(8, 4, modalities="vt")  # type: ignore[arg-type]
    adapter = fastadapters.BottleneckAdapter(8, 4)
    adapter("x")  # type: ignore[arg-type]
    adapter(x).logits()  # type: ignore[attr-defined]
    fastadapters.MultiwayAdapter(8, 4)(x)  # type: ignore[call-overload]
    fastadapters.MultiwayAdapter(8, 4)(x, 1, splits=(2,))  # type: ignore[call-overload]
    fastadapters.GroupedAdapter(8, 4, layernorm="out")  # type: ignore[arg-type]
    fastadapters.AlignmentEnhancer(8, 4)(x, x)  # type: ignore[call-arg]
    fastadapters.MultiModalAdapter()("x")  # type: ignore[call-overload]
    fastadapters.WanderAdapter(8, [4], 2, feature_rank=1, time_rank=1)(x, "1")  # type: ignore[arg-type]
    fastadapters.explain(bottleneck, x)  # type: ignore[call-arg]
    fastadapters.explain(adapter, x, y=x)  # type: ignore[call-arg]
    fastadapters.patch("model")  # type: ignore[arg-type]

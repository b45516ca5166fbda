"""The Multi-Modal Adapter: features to features, and features to class logits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from .. import backends, eager
from ..checks import (
    check_activations,
    check_bias,
    check_choice,
    check_floats,
    check_integer,
    check_list,
    check_ndim,
    check_number,
    check_tensor,
)
from ..ops import NAMESPACES, autograd
from ..ops.codes import ACTIVATION_CODES, DTYPE_CODES
from ..ops.multimodal import ADAPT_CODES
from ..options import Activation, Adapt, Outputs
from ..reference.cross_modal_attention import MASKED, Bias
from ..reference.multimodal import Layer, MultiModalLayers
from .arguments import PLAIN, compute_dtype, leaf, owned, parameter, saves, without_autocast
from .cross_modal_attention import attend
from .shards import on_shards

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def _all(layers: MultiModalLayers) -> list[Layer]:
    """From text and image to the features, in the order of the computation."""
    return [*layers.down, layers.in_proj, layers.out_proj, *layers.up]


def _to(layers: MultiModalLayers, dtype: torch.dtype) -> MultiModalLayers:
    pairs: list[Layer] = [(weight.to(dtype), bias.to(dtype)) for weight, bias in _all(layers)]
    n = len(layers.down)
    return MultiModalLayers(pairs[:n], pairs[n], pairs[n + 1], pairs[n + 2 :])


def check_features(text: Tensor, image: Tensor) -> None:
    check_activations("image", image, "[B, D]", 2)
    n_items, d = image.shape
    check_floats("text", text, "[C, D]")
    if text.dim() not in (2, 3) or text.shape[-2] == 0:
        raise ValueError(f"text: expected [C, D] with C >= 1, got {list(text.shape)}")
    shape = (n_items,) * (text.dim() - 2) + (text.shape[-2], d)
    check_tensor("text", text, "[C, D]" if text.dim() == 2 else "[B, C, D]", shape, image.device)


def check_logits(text: Tensor, logit_scale: float | Tensor, adapt: Adapt) -> None:
    if text.dim() != 2:
        raise ValueError(f"text: expected [C, D], got {list(text.shape)}")
    check_choice("adapt", adapt, ADAPT_CODES)
    _scalar("logit_scale", logit_scale, text.device)


def _scalar(name: str, value: float | Tensor, device: torch.device) -> float | Tensor:
    """A number, or a tensor of one element as []."""
    if not isinstance(value, Tensor):
        return check_number(name, value, " or a tensor")
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name}: expected a number or a tensor, got one of {value.dtype}")
    if value.numel() != 1:
        raise ValueError(f"{name}: expected one element, got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {value.device}")
    return value.reshape(())


def _check_layers(name: str, layers: Sequence[Layer]) -> list[Layer]:
    """One or two layers, each a pair."""
    listed = check_list(name, layers, "one or two layers")
    if len(listed) not in (1, 2):
        raise ValueError(f"{name}: expected one or two layers, got {len(listed)}")
    for i, layer in enumerate(listed):
        if not isinstance(layer, (tuple, list)) or len(layer) != 2:
            at = f"{name}[{i}]" if len(listed) > 1 else name
            raise TypeError(f"{at}: expected a pair (weight, bias), got {type(layer).__name__}")
    return listed


def _number_or(value: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return value.to(dtype) if isinstance(value, Tensor) else value


def _check_multimodal(
    text: Tensor,
    image: Tensor,
    layers: MultiModalLayers,
    num_heads: int,
    bias: Bias,
    down_activation: Activation,
) -> tuple[int, Bias]:
    """All arguments must fit; the number of heads as an int, the bias as floats."""
    check_features(text, image)
    if not isinstance(layers, MultiModalLayers):
        raise TypeError(f"layers: expected MultiModalLayers, got {type(layers).__name__}")
    groups = {
        name: _check_layers(f"layers.{name}", [value] if name.endswith("proj") else value)
        for name, value in layers._asdict().items()
    }
    device, d = image.device, image.shape[1]
    check_ndim("layers.out_proj weight", layers.out_proj[0], "[E, E]", 2)
    e = layers.out_proj[0].shape[0]
    for name, ends, end_symbols in (
        ("down", (d, e), ("D", "E")),
        ("in_proj", (e, 3 * e), ("E", "3 E")),
        ("out_proj", (e, e), ("E", "E")),
        ("up", (e, d), ("E", "D")),
    ):
        group, at = groups[name], f"layers.{name}"
        sizes, symbols = list(ends), list(end_symbols)
        if len(group) == 2:
            check_ndim(f"{at}[0] weight", group[0][0], f"[R, {symbols[0]}]", 2)
            sizes.insert(1, group[0][0].shape[0])
            symbols.insert(1, "R")
        for i, (weight, constant) in enumerate(group):
            n_in, n_out = sizes[i], sizes[i + 1]
            at = f"layers.{name}[{i}]" if len(group) > 1 else f"layers.{name}"
            shown = f"[{symbols[i + 1]}, {symbols[i]}]"
            check_tensor(f"{at} weight", weight, shown, (n_out, n_in), device)
            check_tensor(f"{at} bias", constant, f"[{symbols[i + 1]}]", (n_out,), device)
    heads = check_integer("num_heads", num_heads)
    if heads < 1 or e % heads:
        raise ValueError(f"num_heads: expected a divisor of E = {e}, got {heads}")
    check_choice("down_activation", down_activation, ACTIVATION_CODES)
    return heads, check_bias("bias", bias)


def _attention(name: str, *tensors: Tensor, bias: Bias, outputs: Outputs) -> Any:
    return attend(name, tensors, bias, tensors[0].shape[-1] ** -0.5, outputs)


def _per_item(text: object) -> tuple[str, ...]:
    """The names of the arguments that have a leading B."""
    return ("image", "text") if isinstance(text, Tensor) and text.dim() == 3 else ("image",)


def multimodal_features(
    text: Tensor,
    image: Tensor,
    layers: MultiModalLayers,
    *,
    num_heads: int,
    bias: Bias = MASKED,
    down_activation: Activation = "identity",
) -> tuple[Tensor, Tensor]:
    """What the multi-modal adapter makes of class texts and of images (arXiv 2409.02958).

    Down-sampler, multi-head attention over [texts ; image] of each item, up-sampler.

    Args:
        text: [C, D], shared by all items, or [B, C, D].
        image: [B, D]; its dtype is the op's.
        layers: the adapter's, see `MultiModalLayers`.
        num_heads: H, a divisor of E.
        bias: as in `cross_modal_attention`.
        down_activation: between the two layers of the down-sampler, if there are two.

    Parameters of another floating dtype than image are rounded to it on the way in; each gradient
    has its parameter's dtype.

    Returns:
        text [B, C, D], image [B, D].

    Raises:
        As `cross_modal_attention`.

    Examples:
        >>> def layer(n_in, n_out):
        ...     return torch.randn(n_out, n_in) / n_in**0.5, torch.zeros(n_out)
        >>> layers = MultiModalLayers(
        ...     down=[layer(512, 128)], in_proj=layer(128, 3 * 128),
        ...     out_proj=layer(128, 128), up=[layer(128, 512)],
        ... )
        >>> text, image = torch.randn(100, 512), torch.randn(8, 512)  # 100 classes, 8 images
        >>> new_text, new_image = multimodal_features(text, image, layers, num_heads=4)
        >>> new_text.shape, new_image.shape
        (torch.Size([8, 100, 512]), torch.Size([8, 512]))
    """
    if isinstance(image, Proxy):
        return leaf(multimodal_features, locals())
    sharded = (
        None
        if type(image) in backends.PLAIN_TYPES
        else on_shards(multimodal_features, locals(), _per_item(text), 1)
    )
    if sharded is not None and not isinstance(sharded, str):
        return sharded
    num_heads, bias = _check_multimodal(text, image, layers, num_heads, bias, down_activation)
    dtype = compute_dtype(image)
    e = layers.out_proj[0].shape[0]
    others = (text, *(t for layer in _all(layers) for t in layer))
    problem = backends.Problem(e, e // num_heads, dtype, dtype, others, sharded)
    name = backends.resolve("cross_modal_attention", image, problem)
    options: dict[str, Any] = {}
    if name not in PLAIN:
        options["attention"] = functools.partial(_attention, name)
    with without_autocast(image):
        new_text, new_image = PLAIN.get(name, eager).multimodal_features(
            text.to(dtype), image.to(dtype), _to(layers, dtype), num_heads=num_heads, bias=bias,
            down_activation=down_activation, **options,
        )  # fmt: skip
    return owned(new_text), owned(new_image)


def multimodal_logits(
    text: Tensor,
    image: Tensor,
    layers: MultiModalLayers,
    *,
    num_heads: int,
    logit_scale: float | Tensor,
    bias: Bias = MASKED,
    blend: float | Tensor = 0.2,
    adapt: Adapt = "both",
    down_activation: Activation = "identity",
) -> Tensor:
    """Class logits of CLIP features blended with the multi-modal adapter's (arXiv 2409.02958).

        new(f)  = unit(blend * unit(adapter(f)) + (1 - blend) * unit(f))
        logits  = logit_scale * new(image) . new(text)

    But for the reference backend, nothing as large as [B, C, D] is held, and where the compute
    dtype has 16 bits all is computed in fp32 from the values as they are stored: only the logits
    are rounded.

    Args:
        text: [C, D], one row per class.
        image, layers, num_heads, bias, down_activation: as in `multimodal_features`.
        logit_scale: a number or a tensor of one element: the factor itself, not its logarithm.
        blend: the adapter's share, a number or a tensor of one element.
        adapt: "both", "text" or "image": the features that the adapter changes. With "image" the
            image feature is blended as it comes, not as a unit vector: so the published model.

    Returns:
        logits [B, C] in the compute dtype.

    Raises:
        As `cross_modal_attention`.

    Examples:
        >>> def layer(n_in, n_out):
        ...     return torch.randn(n_out, n_in) / n_in**0.5, torch.zeros(n_out)
        >>> layers = MultiModalLayers(
        ...     down=[layer(512, 128)], in_proj=layer(128, 3 * 128),
        ...     out_proj=layer(128, 128), up=[layer(128, 32), layer(32, 512)],
        ... )
        >>> text, image = torch.randn(100, 512), torch.randn(8, 512)  # 100 classes, 8 images
        >>> multimodal_logits(text, image, layers, num_heads=4, logit_scale=100.0).shape
        torch.Size([8, 100])
    """
    if isinstance(image, Proxy):
        return leaf(multimodal_logits, locals())
    sharded = (
        None
        if type(image) in backends.PLAIN_TYPES
        else on_shards(multimodal_logits, locals(), ("image",), 1)
    )
    if sharded is not None and not isinstance(sharded, str):
        return sharded
    num_heads, bias = _check_multimodal(text, image, layers, num_heads, bias, down_activation)
    check_logits(text, logit_scale, adapt)
    blend = _scalar("blend", blend, image.device)
    logit_scale = _scalar("logit_scale", logit_scale, image.device)
    dtype = compute_dtype(image)
    others = (text, logit_scale, blend, *(t for layer in _all(layers) for t in layer))
    down, up = layers.down, layers.up
    (dim, rank), width = up[-1][0].shape, layers.out_proj[0].shape[0]
    row = dim + 3 * width + (down[0][0].shape[0] if len(down) > 1 else 0)
    problem = backends.Problem(
        image.shape[1], rank, dtype, dtype, others, sharded,
        (text.shape[0], image.shape[0], row, num_heads, width, rank),
    )  # fmt: skip
    name = backends.resolve("multimodal", image, problem)
    if name in PLAIN:
        inside = dtype if name == "reference" or dtype not in _LOW_PRECISION else torch.float32
        with without_autocast(image):
            logits: Tensor = PLAIN[name].multimodal_logits(
                text.to(inside), image.to(inside), _to(layers, inside), num_heads=num_heads,
                logit_scale=_number_or(logit_scale, inside), bias=bias,
                blend=_number_or(blend, inside), adapt=adapt, down_activation=down_activation,
            )  # fmt: skip
        return logits.to(dtype)
    absent: Any = ((None, None),)
    pairs = (*down, *absent * (2 - len(down)), layers.in_proj, layers.out_proj,
             *up, *absent * (2 - len(up)))  # fmt: skip
    scalars = ((t.reshape(1) if isinstance(t, Tensor) else None) for t in (blend, logit_scale))
    tensors = [
        parameter(t, dtype) for t in (text, image, *(t for pair in pairs for t in pair), *scalars)
    ]
    values = (0.0 if isinstance(t, Tensor) else t for t in (blend, logit_scale))
    logits = autograd.call(
        NAMESPACES[name].multimodal_logits_forward.default, tensors,
        (*values, num_heads, *bias[0], *bias[1], ADAPT_CODES[adapt],
         ACTIVATION_CODES[down_activation], DTYPE_CODES[dtype], saves(tensors)),
    )  # fmt: skip
    return logits

"""The ops as pure functions: arguments are checked, a backend chosen, nothing ever written to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, eager, reference
from .checks import (
    check_activations,
    check_bias,
    check_choice,
    check_ndim,
    check_number,
    check_probability,
    check_tensor,
)
from .ops import NAMESPACES, autograd
from .ops.bottleneck import ACTIVATION_CODES
from .reference.cross_modal_attention import MASKED, Bias, Layer

_PLAIN = {"reference": reference, "eager": eager}


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on, else that of ``x``."""
    dtype, device = x.dtype, x.device.type
    if dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """No autocast on the device of ``x``, where there is such a thing."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def check_residual(residual: Tensor | None, x: Tensor) -> None:
    """``residual`` must be None, or shaped like ``x`` on its device."""
    if residual is not None and residual is not x:
        check_tensor("residual", residual, "the shape of x", tuple(x.shape), x.device)


def _check_bottleneck(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    scale: float | Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dropout: float,
) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a floating-point tensor [..., D], got {kind}")
    shape, device = x.shape, x.device
    if not shape or shape[-1] == 0:
        raise ValueError(f"x: expected [..., D] with D >= 1, got {list(shape)}")
    d = shape[-1]
    if not isinstance(down_weight, Tensor):
        raise TypeError(f"down_weight: expected a tensor [r, D], got {type(down_weight).__name__}")
    shape = down_weight.shape
    if len(shape) != 2 or shape[0] == 0:
        raise ValueError(f"down_weight: expected [r, D] with r >= 1, got {list(shape)}")
    r = shape[0]
    check_tensor("down_weight", down_weight, "[r, D]", (r, d), device)
    check_tensor("up_weight", up_weight, "[D, r]", (d, r), device)
    if down_bias is not None:
        check_tensor("down_bias", down_bias, "[r]", (r,), device)
    if up_bias is not None:
        check_tensor("up_bias", up_bias, "[D]", (d,), device)
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, "[D]", (d,), device)
    if norm_bias is not None:
        if norm_weight is None:
            raise ValueError("norm_bias: expected None without norm_weight, got a tensor")
        check_tensor("norm_bias", norm_bias, "[D]", (d,), device)
    check_residual(residual, x)
    if isinstance(scale, Tensor):
        if scale.shape != (1,):
            check_tensor("scale", scale, "[1] or [D]", (d,), device)
        else:
            check_tensor("scale", scale, "[1]", (1,), device)
    else:
        check_number("scale", scale, " or a tensor")
    check_choice("activation", activation, ACTIVATION_CODES)
    check_probability("dropout", dropout)


def _readable(x: Tensor) -> Tensor:
    """x as the kernels read it: unit last stride and one to three leading dimensions."""
    return x if x.stride(-1) == 1 and 2 <= x.dim() <= 4 else x.contiguous()


def _parameter(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A parameter as the kernels read it: they round the dtypes they know, float64 is not one."""
    return t if t is None or t.dtype in backends.FUSED_DTYPES else t.to(dtype)


def _split_scale(scale: float | Tensor) -> tuple[Tensor | None, float]:
    """A scale as the kernels take it: a tensor or None, and what to use without one."""
    return (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)


def _draw_seed(x: Tensor, dropout: float, training: bool) -> Tensor | None:
    """(key, offset) of the dropout stream, from PyTorch's generator on the device of x."""
    return torch.randint(2**62, (2,), device=x.device) if training and dropout > 0.0 else None


def _saves(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a gradient may be asked for, for which the forward must save."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


class BottleneckParameters(NamedTuple):
    """The parameters of one bottleneck, named and shaped as in `bottleneck`."""

    down_weight: Tensor
    up_weight: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    scale: float | Tensor = 1.0
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None


def _plain_bottleneck(
    name: str, x: Tensor, side: BottleneckParameters, residual: Tensor | None, **options: Any
) -> Tensor:
    """The bottleneck on backend ``name``, reference or eager, in the dtype of ``x``."""
    tensors: dict[str, Any] = side._asdict() | {"residual": residual}
    cast = {n: t.to(x.dtype) if isinstance(t, Tensor) else t for n, t in tensors.items()}
    with _without_autocast(x):
        y: Tensor = _PLAIN[name].bottleneck(x, **cast, **options)
    return y


def bottleneck(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "relu",
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """The adapter bottleneck of AdaptFormer, MultiWay-Adapter, Houlsby and Pfeiffer.

        z = norm(x) Wd^T + bd                  [M, r]
        h = dropout(activation(z))             [M, r]
        y = residual + scale * (h Wu^T + bu)   [M, D]

    With the identity activation and residual = a frozen layer's output it is LoRA.

    Args:
        x: [..., D], any strides; float32, bfloat16 or float16 (float64 runs eagerly). M is the
            product of the leading dimensions, 0 included. Cast to the autocast dtype, if any.
        down_weight: Wd [r, D]; any r >= 1.
        up_weight: Wu [D, r].
        down_bias: bd [r] or None.
        up_bias: bu [D] or None.
        activation: "relu", "gelu" (erf), "gelu_tanh", "silu", "quick_gelu" or "identity".
        scale: a number, or a learnable tensor [1] or [D] (one per channel).
        residual: a tensor shaped like x, x itself (known by identity, free of cost), or None.
        norm_weight: [D]; LayerNorm precedes the down-projection iff it is given.
        norm_bias: [D] or None.
        norm_eps: added to the variance.
        dropout: probability of dropping an element of h, where ``training``; the mask follows
            from a seed drawn from PyTorch's generator.
        training: whether dropout is active.

    Parameters of another floating dtype than x are rounded to it on the way in; each gradient
    has its parameter's dtype.

    Returns:
        y: contiguous, with the shape and the compute dtype of x.

    Raises:
        TypeError, ValueError: naming the argument, the shape expected and the shape given.
        RuntimeError: a backend chosen by name cannot run.
    """
    _check_bottleneck(
        x, down_weight, up_weight, down_bias, up_bias, activation, scale, residual,
        norm_weight, norm_bias, dropout,
    )  # fmt: skip
    add_x = residual is x
    dtype = _compute_dtype(x)
    if x.dtype != dtype:
        x = x.to(dtype)
    residual = None if residual is None or add_x else residual.to(dtype)
    seed = _draw_seed(x, dropout, training)
    name = backends.resolve("bottleneck", x)
    if name in _PLAIN:
        side = BottleneckParameters(
            down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias
        )
        options = {"activation": activation, "norm_eps": norm_eps, "dropout": dropout}
        return _plain_bottleneck(name, x, side, x if add_x else residual, seed=seed, **options)
    learnable, scale_value = _split_scale(scale)
    tensors = (
        _readable(x), None if residual is None else _readable(residual),
        _parameter(down_weight, dtype), _parameter(down_bias, dtype), _parameter(up_weight, dtype),
        _parameter(up_bias, dtype), _parameter(norm_weight, dtype), _parameter(norm_bias, dtype),
        _parameter(learnable, dtype), seed,
    )  # fmt: skip
    return autograd.call(
        NAMESPACES[name].bottleneck_forward.default, tensors,
        (scale_value, norm_eps, dropout, ACTIVATION_CODES[activation], add_x, _saves(tensors)),
    )  # fmt: skip


def multiway_bottleneck(
    x: Tensor,
    split: int,
    first: BottleneckParameters,
    second: BottleneckParameters,
    *,
    activation: str = "relu",
    residual: Tensor | None = None,
    norm_eps: float = 1e-5,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Two bottlenecks on the tokens of one tensor, one per modality (MultiWay-Adapter).

    Args:
        x: [..., T, D], with T tokens.
        split: the first ``split`` tokens go through ``first``, the others through ``second``;
            -1 sends all through ``first``, 0 none (torchscale's convention).
        first, second: the adapters' parameters; their widths r may differ.
        activation, residual, norm_eps, dropout, training: as in `bottleneck`.

    Returns:
        y: [..., T, D], contiguous. Both halves are written in place, without concatenation, where
        a fused backend runs.

    Raises:
        As `bottleneck`; ValueError if ``split`` is not in [-1, T].
    """
    if not isinstance(x, Tensor) or x.dim() < 2:
        given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise (ValueError if isinstance(x, Tensor) else TypeError)(
            f"x: expected a tensor [..., T, D], got {given}"
        )
    tokens = x.shape[-2]
    if not -1 <= split <= tokens:
        raise ValueError(f"split: expected -1 <= split <= T = {tokens}, got {split}")
    options: dict[str, Any] = {
        "activation": activation,
        "norm_eps": norm_eps,
        "dropout": dropout,
        "training": training,
    }
    if split in (-1, 0, tokens):
        only = second if split == 0 else first
        return bottleneck(x, **only._asdict(), residual=residual, **options)
    for side in (first, second):
        _check_bottleneck(
            x, side.down_weight, side.up_weight, side.down_bias, side.up_bias, activation,
            side.scale, residual, side.norm_weight, side.norm_bias, dropout,
        )  # fmt: skip
    add_x = residual is x
    x = x.to(_compute_dtype(x))
    name = backends.resolve("bottleneck", x)
    if name in _PLAIN:
        del options["training"]
        halves = []
        for side, tokens_of in ((first, slice(None, split)), (second, slice(split, None))):
            part = x[..., tokens_of, :]
            other = None if residual is None or add_x else residual[..., tokens_of, :]
            options["seed"] = _draw_seed(x, dropout, training)
            halves.append(_plain_bottleneck(name, part, side, part if add_x else other, **options))
        return torch.cat(halves, dim=-2)
    x = _readable(x)
    residual = None if residual is None or add_x else _readable(residual.to(x.dtype))
    tensors: list[Any] = [x, residual]
    scale_values = []
    for side in (first, second):
        learnable, scale_value = _split_scale(side.scale)
        parameters = (
            side.down_weight, side.down_bias, side.up_weight, side.up_bias, side.norm_weight,
            side.norm_bias, learnable,
        )  # fmt: skip
        tensors += (_parameter(t, x.dtype) for t in parameters)
        tensors.append(_draw_seed(x, dropout, training))
        scale_values.append(scale_value)
    return autograd.call(
        NAMESPACES[name].multiway_forward.default, tensors,
        (split, *scale_values, norm_eps, dropout, ACTIVATION_CODES[activation], add_x,
         _saves(tensors)),
    )  # fmt: skip


def cross_modal_attention(
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_q: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    *,
    bias: Bias = MASKED,
    scale: float | None = None,
    outputs: str = "both",
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head attention over the text and the image tokens of each item (arXiv 2409.02958).

        score(q, k) = q.k * scale + bias[modality of q][modality of k]

    An item's sequence is its C text tokens and its I image tokens. No mask is ever built.

    Args:
        text_q, text_k, text_v: [C, H, d], shared by all items (class names), or [B, C, H, d].
        image_q, image_k, image_v: [B, I, H, d]; their dtype is the op's. C, I, H, d >= 1, B >= 0.
        bias: ((text-text, text-image), (image-text, image-image)); -inf blocks. The default lets
            each modality see only the other (the paper's mask); ((0, 1), (1, 0)) is what the
            published code computes, whose float mask is added. A query that sees no key gives 0.
        scale: of q.k; d ** -0.5 if None.
        outputs: "both", or "text" or "image" to compute only that one.

    Returns:
        text_out [B, C, H, d], image_out [B, I, H, d], or the one asked for, in the compute dtype.
        Where queries cannot differ (texts that see one image) it may be an expanded view.

    Raises:
        TypeError, ValueError: naming the argument, the shape expected and the shape given.
        RuntimeError: a backend chosen by name cannot run.
    """
    check_activations("image_q", image_q, "[B, I, H, d]", 4)
    device = image_q.device
    n_items, *shared = image_q.shape
    for name, tensor in (("image_k", image_k), ("image_v", image_v)):
        check_tensor(name, tensor, "[B, I, H, d]", tuple(image_q.shape), device)
    if not isinstance(text_q, Tensor):
        raise TypeError(f"text_q: expected a tensor [C, H, d], got {type(text_q).__name__}")
    if text_q.dim() not in (3, 4) or text_q.shape[-3] == 0:
        raise ValueError(
            f"text_q: expected [C, H, d] or [B, C, H, d] with C >= 1, got {list(text_q.shape)}"
        )
    symbols = "[C, H, d]" if text_q.dim() == 3 else "[B, C, H, d]"
    shape = (n_items,) * (text_q.dim() - 3) + (text_q.shape[-3], *shared[1:])
    for name, tensor in (("text_q", text_q), ("text_k", text_k), ("text_v", text_v)):
        check_tensor(name, tensor, symbols, shape, device)
    check_bias("bias", bias)
    check_choice("outputs", outputs, ("both", "text", "image"))
    if scale is not None:
        check_number("scale", scale, " or None")

    dtype = _compute_dtype(image_q)
    backend = _PLAIN[backends.resolve("cross_modal_attention", image_q)]
    tensors = (t.to(dtype) for t in (text_q, text_k, text_v, image_q, image_k, image_v))
    with _without_autocast(image_q):
        out: Tensor | tuple[Tensor, Tensor] = backend.cross_modal_attention(
            *tensors, bias=bias, scale=scale, outputs=outputs
        )
    return out


def _to(layers: Sequence[Layer], dtype: torch.dtype) -> list[Layer]:
    return [(weight.to(dtype), bias.to(dtype)) for weight, bias in layers]


def _check_multimodal(
    text: Tensor,
    image: Tensor,
    down: Sequence[Layer],
    in_proj: Layer,
    out_proj: Layer,
    up: Sequence[Layer],
    num_heads: int,
    bias: Bias,
    down_activation: str,
) -> None:
    check_activations("image", image, "[B, D]", 2)
    device = image.device
    n_items, d = image.shape
    if not isinstance(text, Tensor):
        raise TypeError(f"text: expected a tensor [C, D], got {type(text).__name__}")
    if text.dim() not in (2, 3) or text.shape[-2] == 0:
        raise ValueError(f"text: expected [C, D] with C >= 1, got {list(text.shape)}")
    shape = (n_items,) * (text.dim() - 2) + (text.shape[-2], d)
    check_tensor("text", text, "[C, D]" if text.dim() == 2 else "[B, C, D]", shape, device)
    check_ndim("out_proj weight", out_proj[0], "[E, E]", 2)
    e = out_proj[0].shape[0]
    for name, layers, ends, end_symbols in (
        ("down", down, (d, e), ("D", "E")),
        ("in_proj", [in_proj], (e, 3 * e), ("E", "3 E")),
        ("out_proj", [out_proj], (e, e), ("E", "E")),
        ("up", up, (e, d), ("E", "D")),
    ):
        if len(layers) not in (1, 2):
            raise ValueError(f"{name}: expected one or two layers, got {len(layers)}")
        sizes, symbols = list(ends), list(end_symbols)
        if len(layers) == 2:
            check_ndim(f"{name}[0] weight", layers[0][0], f"[R, {symbols[0]}]", 2)
            sizes.insert(1, layers[0][0].shape[0])
            symbols.insert(1, "R")
        for i, (weight, constant) in enumerate(layers):
            n_in, n_out, at = sizes[i], sizes[i + 1], f"{name}[{i}]" if len(layers) > 1 else name
            shown = f"[{symbols[i + 1]}, {symbols[i]}]"
            check_tensor(f"{at} weight", weight, shown, (n_out, n_in), device)
            check_tensor(f"{at} bias", constant, f"[{symbols[i + 1]}]", (n_out,), device)
    if num_heads < 1 or e % num_heads:
        raise ValueError(f"num_heads: expected a divisor of E = {e}, got {num_heads}")
    check_bias("bias", bias)
    check_choice("down_activation", down_activation, ACTIVATION_CODES)


def multimodal_features(
    text: Tensor,
    image: Tensor,
    down: Sequence[Layer],
    in_proj: Layer,
    out_proj: Layer,
    up: Sequence[Layer],
    *,
    num_heads: int,
    bias: Bias = MASKED,
    down_activation: str = "identity",
) -> tuple[Tensor, Tensor]:
    """What the multi-modal adapter makes of class texts and of images (arXiv 2409.02958).

    Down-sampler, multi-head attention over [texts ; image] of each item, up-sampler. A layer is
    a pair (weight [out, in], bias [out]); E is the width of the attention, R a hidden width.

    Args:
        text: [C, D], shared by all items, or [B, C, D].
        image: [B, D]; its dtype is the op's.
        down: one layer D -> E, or two, D -> R -> E.
        in_proj: queries, keys and values, E -> 3 E, as in `torch.nn.MultiheadAttention`.
        out_proj: E -> E.
        up: one layer E -> D, or two with a GELU between, E -> R -> D.
        num_heads: H, a divisor of E.
        bias: as in `cross_modal_attention`.
        down_activation: between the two layers of the down-sampler, if there are two.

    Parameters of another floating dtype than image are rounded to it on the way in; each gradient
    has its parameter's dtype.

    Returns:
        text [B, C, D] (an expanded view where all texts get the same), image [B, D].

    Raises:
        As `cross_modal_attention`.
    """
    _check_multimodal(text, image, down, in_proj, out_proj, up, num_heads, bias, down_activation)
    dtype = _compute_dtype(image)
    backend = _PLAIN[backends.resolve("cross_modal_attention", image)]
    with _without_autocast(image):
        features: tuple[Tensor, Tensor] = backend.multimodal_features(
            text.to(dtype), image.to(dtype), _to(down, dtype), *_to((in_proj, out_proj), dtype),
            _to(up, dtype), num_heads=num_heads, bias=bias, down_activation=down_activation,
        )  # fmt: skip
    return features


def multimodal_logits(
    text: Tensor,
    image: Tensor,
    down: Sequence[Layer],
    in_proj: Layer,
    out_proj: Layer,
    up: Sequence[Layer],
    *,
    num_heads: int,
    logit_scale: float | Tensor,
    bias: Bias = MASKED,
    blend: float = 0.2,
    adapt: str = "both",
    down_activation: str = "identity",
) -> Tensor:
    """Class logits of CLIP features blended with the multi-modal adapter's (arXiv 2409.02958).

        new(f)  = unit(blend * unit(adapter(f)) + (1 - blend) * unit(f))
        logits  = logit_scale * new(image) . new(text)

    Eagerly, nothing as large as [B, C, D] is held.

    Args:
        text: [C, D], one row per class.
        image, down, in_proj, out_proj, up, num_heads, bias, down_activation: as in
            `multimodal_features`.
        logit_scale: a number or a tensor of one element: the factor itself, not its logarithm.
        blend: the adapter's share.
        adapt: "both", "text" or "image": the features that the adapter changes. With "image" the
            image feature is blended as it comes, not as a unit vector: so the published model.

    Returns:
        logits [B, C] in the compute dtype.

    Raises:
        As `cross_modal_attention`.
    """
    _check_multimodal(text, image, down, in_proj, out_proj, up, num_heads, bias, down_activation)
    if text.dim() != 2:
        raise ValueError(f"text: expected [C, D], got {list(text.shape)}")
    check_choice("adapt", adapt, ("both", "text", "image"))
    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1:
            raise ValueError(f"logit_scale: expected one element, got {list(logit_scale.shape)}")
        logit_scale = logit_scale.reshape(())
    else:
        check_number("logit_scale", logit_scale, " or a tensor")
    dtype = _compute_dtype(image)
    backend = _PLAIN[backends.resolve("cross_modal_attention", image)]
    with _without_autocast(image):
        logits: Tensor = backend.multimodal_logits(
            text.to(dtype), image.to(dtype), _to(down, dtype), *_to((in_proj, out_proj), dtype),
            _to(up, dtype), num_heads=num_heads,
            logit_scale=logit_scale.to(dtype) if isinstance(logit_scale, Tensor) else logit_scale,
            bias=bias, blend=blend, adapt=adapt, down_activation=down_activation,
        )  # fmt: skip
    return logits


def sequence_fusion(
    inputs: Sequence[Tensor],
    down_weights: Sequence[Tensor],
    down_biases: Sequence[Tensor | None],
    time_factors: Sequence[Tensor],
    feature_factors: Sequence[Tensor],
    *,
    activation: str = "gelu",
    residual: Tensor | None = None,
) -> Tensor:
    """Low-rank fusion of any number M of token sequences (Wander, arXiv 2412.08979).

        H_m = activation(x_m Wd_m^T + b_m)                     [B, T_m, r]
        y = residual + sum_q prod_m A_mq^T H_m U_mq            [B, T_o, D]    q = 1 .. R

    Args:
        inputs: M tensors x_m [B, T_m, D_m]; the first one's dtype is the op's. M, T_m, D_m >= 1.
        down_weights: M tensors Wd_m [r_m, D_m].
        down_biases: M tensors b_m [r_m], or None in a modality's place.
        time_factors: M tensors A_m [R, T_m, T_o].
        feature_factors: M tensors U_m [R, r_m, D].
        activation: as in `bottleneck`.
        residual: [B, T_o, D] or None.

    R = 1 with factors summed over their ranks beforehand is the published module. Parameters of
    another floating dtype than the inputs are rounded to it on the way in; each gradient has its
    parameter's dtype.

    Returns:
        y [B, T_o, D] in the compute dtype.

    Raises:
        TypeError, ValueError: naming the argument, the shape expected and the shape given.
        RuntimeError: a backend chosen by name cannot run.
    """
    modalities = len(inputs)
    if modalities == 0:
        raise ValueError("inputs: expected at least one tensor, got none")
    for name, group in (
        ("down_weights", down_weights),
        ("down_biases", down_biases),
        ("time_factors", time_factors),
        ("feature_factors", feature_factors),
    ):
        if len(group) != modalities:
            raise ValueError(f"{name}: expected M = {modalities} tensors, got {len(group)}")
    for i, x in enumerate(inputs):
        check_activations(f"inputs[{i}]", x, "[B, T, D]", 3)
    check_ndim("time_factors[0]", time_factors[0], "[R, T, T_o]", 3)
    check_ndim("feature_factors[0]", feature_factors[0], "[R, r, D]", 3)
    first, device = inputs[0], inputs[0].device
    (rank, _, length), d = time_factors[0].shape, feature_factors[0].shape[2]
    for i, x in enumerate(inputs):
        check_tensor(f"inputs[{i}]", x, "[B, T, D]", (first.shape[0], *x.shape[1:]), device)
        check_ndim(f"down_weights[{i}]", down_weights[i], "[r, D]", 2)
        width = down_weights[i].shape[0]
        check_tensor(f"down_weights[{i}]", down_weights[i], "[r, D]", (width, x.shape[2]), device)
        constant = down_biases[i]
        if constant is not None:
            check_tensor(f"down_biases[{i}]", constant, "[r]", (width,), device)
        check_tensor(
            f"time_factors[{i}]", time_factors[i], "[R, T, T_o]", (rank, x.shape[1], length), device
        )
        check_tensor(
            f"feature_factors[{i}]", feature_factors[i], "[R, r, D]", (rank, width, d), device
        )
    if residual is not None:
        check_tensor("residual", residual, "[B, T_o, D]", (first.shape[0], length, d), device)
    check_choice("activation", activation, ACTIVATION_CODES)

    dtype = _compute_dtype(first)
    backend = _PLAIN[backends.resolve("sequence_fusion", first)]
    groups = (
        [None if t is None else t.to(dtype) for t in group]
        for group in (inputs, down_weights, down_biases, time_factors, feature_factors)
    )
    with _without_autocast(first):
        y: Tensor = backend.sequence_fusion(
            *groups, activation=activation,
            residual=None if residual is None else residual.to(dtype),
        )  # fmt: skip
    return y

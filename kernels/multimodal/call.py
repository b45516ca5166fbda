"""One call of the head: its arguments and sizes, and how its linear layers are launched."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...ops.multimodal import PARAMETERS
from ...ops.multimodal_state import Sizes, sizes
from ..activations import GELU, IDENTITY
from ..launch import architecture, contiguous, precision
from . import tiles
from .linear import linear_kernel

OPTIONS = (
    "blend_value",
    "scale_value",
    "num_heads",
    "bias_tt",
    "bias_ti",
    "bias_it",
    "bias_ii",
    "adapt",
    "down_activation",
    "out_dtype",
)


class Call(NamedTuple):
    """What every launch of one call shares."""

    s: Sizes
    of: dict[str, Any]  # the arguments by their names in the schema, parameters contiguous
    text_shift: float  # what an image's bias is above a text's, for text queries
    image_shift: float
    meta: dict[str, Any]  # of products

    @property
    def head_dim(self) -> int:
        return self.s.e // self.s.h

    @property
    def scale(self) -> float:
        """Of a query."""
        return float(self.head_dim**-0.5)

    @property
    def activation(self) -> int:
        """Before the last layer."""
        return int((GELU if self.s.composed else IDENTITY).value)

    @property
    def last(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the last layer."""
        suffix = "_2" if self.s.composed else ""
        return self.of[f"up_weight{suffix}"], self.of[f"up_bias{suffix}"]

    @property
    def numbers(self) -> tuple[Any, ...]:
        """blend and its rest, and logit_scale: each as tensor or None and as numbers."""
        of = self.of
        return (*self.blend, of["logit_scale"], of["scale_value"])

    @property
    def blend(self) -> tuple[Tensor | None, float, float]:
        """As tensor or None, as number, and 1 minus that number, before it is rounded."""
        value = self.of["blend_value"]
        return self.of["blend"], value, 1 - value


def rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def call(text: Tensor, image: Tensor, *rest: Any) -> Call:
    """Of the parameters and options in the order of the schema."""
    n = len(PARAMETERS)
    of = dict(zip(PARAMETERS, contiguous(*rest[:n]), strict=True))
    of |= dict(zip(OPTIONS, rest[n:], strict=True))
    of |= {"text": rows_contiguous(text), "image": rows_contiguous(image)}
    return Call(
        sizes(of),
        of,
        _difference(of["bias_ti"], of["bias_tt"]),
        _difference(of["bias_ii"], of["bias_it"]),
        {
            "PRECISION": precision(),
            "BLOCK_K": tiles.STEPS,
            "num_warps": tiles.WARPS,
            "num_stages": 1,
            **tiles.registers(architecture()),
        },
    )


def _difference(a: float, b: float) -> float:
    """a - b; of no use, and no number, where one of them blocks."""
    return a - b if min(a, b) > -torch.inf else 0.0


def linear(
    c: Call,
    text: Tensor | None,
    image: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    out_text: Tensor | None,
    out_image: Tensor | None,
    *,
    transposed: bool = False,
    heads: int = 1,
    active: tuple[Tensor | None, Tensor | None] = (None, None),
    activation: int = IDENTITY.value,
    gate: Tensor | None = None,
    gate_activation: int = IDENTITY.value,
    added: Tensor | None = None,
) -> None:
    """a W^T + bias, times act'(gate), plus what is added, of rows of text and of image.

    Of the two, those without an output are left out. ``active`` gets act of the results.
    ``transposed``: by W in W^T's place. With ``heads`` a and weight have a part of their columns
    for each, and out all columns of each.
    """
    n_texts = 0 if out_text is None else out_text.shape[0]
    n_images = 0 if out_image is None else out_image.shape[0]
    if n_texts + n_images == 0:
        return
    first = out_image if out_text is None else out_text
    stride_n, stride_k = weight.stride()[::-1] if transposed else weight.stride()
    k = weight.shape[0 if transposed else 1] // heads
    n = weight.shape[1 if transposed else 0]
    meta = {"BLOCK_M": tiles.ROWS, "BLOCK_N": tiles.COLUMNS}
    blocks = triton.cdiv(n_texts, tiles.ROWS) + triton.cdiv(n_images, tiles.ROWS)
    linear_kernel[(blocks, triton.cdiv(n, tiles.COLUMNS), heads)](
        text,
        image,
        weight,
        bias,
        gate,
        added,
        out_text,
        out_image,
        *active,
        n_texts,
        n_images,
        0 if text is None else text.stride(0),
        0 if image is None else image.stride(0),
        stride_n,
        stride_k,
        first.stride(0),  # type: ignore[union-attr]
        k,
        k * stride_k,
        n,
        1.0 / heads,
        k,
        n,
        ACTIVATION=activation,
        GATE=gate_activation,
        **meta,
        **c.meta,
    )


def empty(c: Call, *shape: int) -> Tensor:
    """Of fp32, on the device of the features."""
    image: Tensor = c.of["image"]
    return image.new_empty(shape, dtype=torch.float32)

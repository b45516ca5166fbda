"""Training steps that launch the Triton kernels of each op, for `test_triton_compile.py`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastadapters.ops.codes import DTYPE_CODES

BF16, FP32 = torch.bfloat16, torch.float32
EVERYTHING, PLAIN = "every option", "plain"
IN_FRONT = f"{EVERYTHING}, D_out 1536"


class Step(NamedTuple):
    """A step: dtypes as in "bfloat16", or several; a size that decides the tiles; options."""

    dtypes: str
    size: int
    options: str
    launch: Callable[[], None]
    kernels: tuple[str, ...] = ()  # which of them are not those of another step; none: all
    ieee: bool = False  # whether the products are fp32


def _names(*dtypes: torch.dtype) -> str:
    names = [str(t).removeprefix("torch.") for t in dtypes]
    return names[0] if len({*names}) == 1 else " ".join(names)


def _bottleneck(
    x_dtype: torch.dtype, compute: torch.dtype, r: int, full: bool, d_out: int, adapters: int = 0
) -> None:
    """With each option there is and fp32 parameters, or with biases alone.

    Where D_out is not D, with dropout in front, too; of several adapters one for each item.
    """
    from fastadapters.kernels import bottleneck as kernels

    d, m = 768, 256
    x, dy = (torch.empty(m, n, dtype=x_dtype) for n in (d, d_out))
    shapes: list[tuple[int, ...]] = [(r, d), (r,), (d_out, r), (d_out,), (d,), (d,), (d_out,)]
    forward, backward, index = kernels.bottleneck_forward, kernels.bottleneck_backward, []
    if adapters:
        shapes = [(adapters, *shape) for shape in shapes]
        forward, backward = kernels.grouped_forward, kernels.grouped_backward
        index = [torch.zeros(4, dtype=torch.int64)]
    parameters: list[Any] = [torch.empty(s, dtype=FP32 if full else compute) for s in shapes]
    if not full:
        parameters[4:] = [None] * 3
    seed = torch.empty(2, dtype=torch.int64) if full else None
    codes = DTYPE_CODES[compute], DTYPE_CODES[x_dtype]
    dropouts = (0.1 if full else 0.0, 0.0 if d_out == d else 0.1)
    rest = (*parameters, seed, *index, 1.0, 1e-5, *dropouts, 2, *codes, d_out == d)
    _, z, stats = forward(x, None, *rest, True)
    backward(dy, x, z, stats, *rest, 255)


def _bottlenecks(
    found: list[tuple[torch.dtype, torch.dtype, int, str]], *kernels: str, adapters: int = 0
) -> list[Step]:
    return [
        Step(
            _names(x, compute, x), r, options,
            functools.partial(
                _bottleneck, x, compute, r, options != PLAIN, 1536 if options == IN_FRONT else 768,
                adapters,
            ),
            kernels, ieee=compute == FP32,
        )
        for x, compute, r, options in found
    ]  # fmt: skip


def bottleneck(arch: str) -> list[Step]:
    """What compiles to every tile, and with other instructions."""
    found = [(BF16, BF16, r, EVERYTHING) for r in (32, 64, 128)]
    found += [(FP32, BF16, r, EVERYTHING) for r in (64, 128)]
    found.append((FP32, FP32, 64, EVERYTHING))
    if arch in ("sm_80", "sm_90"):
        found.append((BF16, BF16, 64, PLAIN))
    return _bottlenecks(found)


def dropout_in_front(arch: str) -> list[Step]:
    """The bottleneck's kernels that draw the mask of x, too."""
    found = [(BF16, BF16, r, IN_FRONT) for r in (32, 64, 128)]
    found += [(FP32, BF16, 128, IN_FRONT), (FP32, FP32, 64, IN_FRONT)]
    return _bottlenecks(found, "forward", "backward", "weights")


def grouped(arch: str) -> list[Step]:
    """The bottleneck's kernels with an adapter per item, and the one that makes their tables."""
    found = [(BF16, BF16, r, EVERYTHING) for r in (64, 128)]
    found += [(FP32, BF16, 128, EVERYTHING), (FP32, FP32, 64, EVERYTHING), (BF16, BF16, 64, PLAIN)]
    return _bottlenecks(found, adapters=16)


def _sequence_fusion(
    x_dtype: torch.dtype, compute: torch.dtype, modalities: int, r: int, full: bool
) -> None:
    """As published, or with summed factors in fp32 and lengths, too."""
    from fastadapters.kernels import sequence_fusion as kernels

    d, m = 768, modalities
    ranks, dtype = (2, FP32) if full else (1, compute)
    shapes = [(r, d), (r,), (ranks, 512, 16), (ranks, r, d)]
    parameters = [[torch.empty(s, dtype=dtype) for _ in range(m)] for s in shapes]
    xs = [torch.empty(8, 512, d, dtype=x_dtype) for _ in range(m)]
    lengths = torch.zeros(m, 8, dtype=torch.int64) if full else None
    codes = DTYPE_CODES[compute], DTYPE_CODES[x_dtype]
    rest = (*parameters, lengths, 2, *codes, full, True)
    y, products, z = kernels.sequence_fusion_forward(xs, None, *rest, True)
    kernels.sequence_fusion_backward(y, xs, products, z, *rest, (1 << 5 * m) - 1)


def sequence_fusion(arch: str) -> list[Step]:
    found = [
        (BF16, BF16, 2, 16, False),
        (FP32, BF16, 7, 16, True),
        (BF16, BF16, 3, 64, True),
        (FP32, FP32, 2, 32, True),
    ]
    return [
        Step(
            _names(x, compute), r, f"{EVERYTHING if full else PLAIN}, {m} modalities",
            functools.partial(_sequence_fusion, x, compute, m, r, full), ieee=compute == FP32,
        )
        for x, compute, m, r, full in found
    ]  # fmt: skip


def _multimodal(r: int, bias: tuple[float, ...]) -> None:
    """Both adapted, MLPs before and behind the attention, numbers that are learned."""
    from fastadapters.kernels import multimodal as kernels

    c, b, d, e, heads = 100, 32, 512, 64, 4
    text, image = torch.empty(c, d), torch.empty(b, d)
    shapes: list[tuple[int, ...]] = []
    for n_in, n_out in ((d, r), (r, e), (e, 3 * e), (e, e), (e, r), (r, d)):
        shapes += [(n_out, n_in), (n_out,)]
    parameters = [torch.empty(s) for s in (*shapes, (1,), (1,))]
    options = (0.0, 0.0, heads, *bias, 0, 2, DTYPE_CODES[FP32])
    logits, state = kernels.multimodal_logits_forward(text, image, *parameters, *options, True)
    kernels.multimodal_logits_backward(
        logits, text, state, image, *parameters, *options, (1 << 2 + len(parameters)) - 1
    )


def multimodal(arch: str) -> list[Step]:
    """Texts that see both, the kernels of pairs at several R; texts that see their image alone."""
    pairs = ("pairs", "d_pairs")
    found = [("additive", (0.0, 1.0, 1.0, 0.0), 32, ())]
    found += [("additive", (0.0, 1.0, 1.0, 0.0), r, pairs) for r in (64, 128)]
    found.append(("masked", (-math.inf, 0.0, 0.0, -math.inf), 32, ("cosines", "d_cosines")))
    return [
        Step(_names(FP32), r, name, functools.partial(_multimodal, r, bias), kernels, ieee=True)
        for name, bias, r, kernels in found
    ]


def _cross_modal_attention(dtype: torch.dtype, width: int) -> None:
    from fastadapters.kernels import cross_modal_attention as kernels

    text, image = (100, 4, width), (32, 2, 4, width)
    tensors = [torch.empty(s, dtype=dtype) for s in [text] * 3 + [image] * 3]
    options = (0.3, 0.0, 1.0, 1.0, 0.0, 3)
    *outs, state = kernels.cross_modal_attention_forward(*tensors, *options, True)
    kernels.cross_modal_attention_backward(*outs, *tensors, state, *options, 63)


def cross_modal_attention(arch: str) -> list[Step]:
    """Every tile, each query seeing all it can."""
    found = [(BF16, 64), (BF16, 128), (FP32, 64), (FP32, 128)]
    return [
        Step(
            _names(dtype),
            d,
            "every block",
            functools.partial(_cross_modal_attention, dtype, d),
            ieee=dtype == FP32,
        )
        for dtype, d in found
    ]


OPS: dict[str, Callable[[str], list[Step]]] = {
    "bottleneck": bottleneck,
    "dropout_in_front": dropout_in_front,
    "grouped": grouped,
    "multimodal": multimodal,
    "cross_modal_attention": cross_modal_attention,
    "sequence_fusion": sequence_fusion,
}

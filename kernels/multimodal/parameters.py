"""The gradients of the parameters: products of rows, summed over texts and images."""

from __future__ import annotations

import triton
import triton.language as tl

from ..products import multiply
from .forms import BOTH, ITEM, TEXTS
from .linear import column


@triton.jit
def _tile(n_cols, BLOCK: tl.constexpr):
    """Rows and columns of tile program 0 of a matrix with this many columns."""
    tiles = tl.cdiv(n_cols, BLOCK)
    rows = tl.program_id(0) // tiles * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    return rows, cols, tl.program_id(0) % tiles == 0


@triton.jit
def _store(out, rows, cols, n_rows, n_cols, tile):
    tl.store(
        out + rows[:, None] * n_cols + cols[None, :],
        tile.to(out.dtype.element_ty),
        mask=(rows < n_rows)[:, None] & (cols < n_cols)[None, :],
    )


@triton.jit
def _of_linear(
    d_weight,
    d_bias,
    d_out,
    x,
    x_stride,
    image,
    image_stride,
    n,
    n_images,
    N,
    K,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of a layer K -> N: d_out^T x over n rows of x and, where given, more rows of image."""
    rows, cols, first = _tile(K, BLOCK)
    in_rows = rows < N
    in_cols = cols < K
    if d_weight is not None:
        tile = tl.zeros([BLOCK, BLOCK], tl.float32)
        tile = multiply(
            tile, d_out, rows, in_rows, N, x, cols, in_cols, x_stride, n,
            PRECISION, BLOCK_K,
        )  # fmt: skip
        if image is not None:
            tile = multiply(
                tile, d_out + n.to(tl.int64) * N, rows, in_rows, N,
                image, cols, in_cols, image_stride, n_images, PRECISION, BLOCK_K,
            )  # fmt: skip
        _store(d_weight, rows, cols, N, K, tile)
    if d_bias is not None and first:
        total = column(d_out, N, None, 0, rows, in_rows, n + n_images, BLOCK)
        tl.store(d_bias + rows, total.to(d_bias.dtype.element_ty), mask=in_rows)


@triton.jit
def _of_inner(
    d_weight,
    d_bias,
    d_hidden,
    hidden_stride,
    d_z,
    attended,
    values,
    mixed,
    C,
    B,
    n_up_texts,
    n_u,
    E,
    H,
    R,
    TEXT: tl.constexpr,
    IMAGE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Of the layer behind attention, E -> R: a tile is of one head's inputs."""
    head_dim = E // H
    blocks = tl.cdiv(head_dim, BLOCK_H)
    tiles = H * blocks
    rows = tl.program_id(0) // tiles * BLOCK + tl.arange(0, BLOCK)
    in_rows = rows < R
    head = tl.program_id(0) % tiles // blocks
    units = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    in_units = units < head_dim
    cols = head * head_dim + units
    if d_weight is not None:
        tile = tl.zeros([BLOCK, BLOCK_H], tl.float32)
        own_values = values + C.to(tl.int64) * 3 * E
        own_attended = attended
        if attended is not None:
            own_attended += C.to(tl.int64) * E
        of_image = d_z
        if d_z is not None:
            of_image += n_up_texts.to(tl.int64) * R
        if TEXT == BOTH:
            part = d_hidden + head * R
            tile = multiply(
                tile, part, rows, in_rows, hidden_stride, attended, cols, in_units, E, C,
                PRECISION, BLOCK_K,
            )  # fmt: skip
            tile = multiply(
                tile, part + C.to(tl.int64) * hidden_stride, rows, in_rows, hidden_stride,
                own_values, cols, in_units, 3 * E, B, PRECISION, BLOCK_K,
            )  # fmt: skip
        elif TEXT == TEXTS:
            tile = multiply(
                tile, d_z, rows, in_rows, R, attended, cols, in_units, E, C, PRECISION, BLOCK_K
            )
        elif TEXT == ITEM:
            tile = multiply(
                tile, d_z, rows, in_rows, R, own_values, cols, in_units, 3 * E, B,
                PRECISION, BLOCK_K,
            )  # fmt: skip
        if IMAGE == BOTH:
            tile = multiply(
                tile, of_image, rows, in_rows, R, mixed, cols, in_units, E, B, PRECISION, BLOCK_K
            )
        elif IMAGE == TEXTS:
            tile = multiply(
                tile, of_image, rows, in_rows, R, own_attended, cols, in_units, E, B,
                PRECISION, BLOCK_K,
            )  # fmt: skip
        elif IMAGE == ITEM:
            tile = multiply(
                tile, of_image, rows, in_rows, R, own_values, cols, in_units, 3 * E, B,
                PRECISION, BLOCK_K,
            )  # fmt: skip
        tl.store(
            d_weight + rows[:, None] * E + cols[None, :],
            tile.to(d_weight.dtype.element_ty),
            mask=in_rows[:, None] & in_units[None, :],
        )
    if d_bias is not None and tl.program_id(0) % tiles == 0:
        total = tl.zeros([BLOCK], tl.float32)
        if TEXT == BOTH:
            for head in range(0, H):
                total += column(
                    d_hidden + head * R, hidden_stride, None, 0, rows, in_rows, C + B, BLOCK
                )
            total = total / H
        if d_z is not None:
            total += column(d_z, R, None, 0, rows, in_rows, n_u, BLOCK)
        tl.store(d_bias + rows, total.to(d_bias.dtype.element_ty), mask=in_rows)


@triton.jit
def _of_last(
    d_weight,
    d_bias,
    weight,
    bias,
    features,
    d_hidden,
    hidden_stride,
    d_gram,
    e,
    d_u,
    n_features,
    n_u,
    D,
    H,
    R,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of the last layer, R -> D: W and b, through their products and through u = W e + b."""
    rows, cols, first = _tile(R, BLOCK)
    in_rows = rows < D
    in_cols = cols < R
    if d_weight is not None:
        tile = tl.zeros([BLOCK, BLOCK], tl.float32)
        if d_gram is not None:
            tile = multiply(
                tile, weight, rows * R, in_rows, 1, d_gram, cols, in_cols, R, R, PRECISION, BLOCK_K
            )
            b = tl.load(bias + rows, mask=in_rows, other=0.0).to(tl.float32)
            d_linear = tl.load(d_gram + R * R + cols, mask=in_cols, other=0.0)
            tile = 2.0 * tile + b[:, None] * d_linear[None, :]
            tile = multiply(
                tile, features, rows, in_rows, D, d_hidden + H * R, cols, in_cols, hidden_stride,
                n_features, PRECISION, BLOCK_K,
            )  # fmt: skip
        if d_u is not None:
            tile = multiply(
                tile, d_u, rows, in_rows, D, e, cols, in_cols, R, n_u,
                PRECISION, BLOCK_K,
            )  # fmt: skip
        _store(d_weight, rows, cols, D, R, tile)
    if d_bias is not None and first:
        total = tl.zeros([BLOCK], tl.float32)
        if d_gram is not None:
            total = column(weight, 1, d_gram + R * R, 1, rows * R, in_rows, R, BLOCK)
            b = tl.load(bias + rows, mask=in_rows, other=0.0).to(tl.float32)
            total += 2.0 * tl.load(d_gram + R * R + R) * b
            d_constants = d_hidden + (H + 1) * R
            total += column(
                features, D, d_constants, hidden_stride, rows, in_rows, n_features, BLOCK
            )
        if d_u is not None:
            total += column(d_u, D, None, 0, rows, in_rows, n_u, BLOCK)
        tl.store(d_bias + rows, total.to(d_bias.dtype.element_ty), mask=in_rows)


@triton.jit
def _sum_scalars(parts, step, n):
    total = tl.zeros([256], tl.float32)
    for start in range(0, n, 256):
        part = start + tl.arange(0, 256)
        total += tl.load(parts + part.to(tl.int64) * step, mask=part < n, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["projected", "B"])
def projections_kernel(
    d_down_weight,
    d_down_bias,
    d_down_weight_2,
    d_down_bias_2,
    d_in_weight,
    d_in_bias,
    d_down,
    text,
    image,
    d_x,
    down,
    d_qkv,
    x,
    text_stride,
    image_stride,
    projected,
    B,
    D,
    DOWN,
    E,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Each gradient where its pointer is not None; program 1 chooses the layer.

    Rows are those of ``projected`` texts and of images: d_down is of the first layer's, down [.,
    DOWN] goes into the second, d_x and x [., E] are of the whole down-sampler.
    """
    if tl.program_id(1) == 0:
        if d_down_weight is not None or d_down_bias is not None:
            _of_linear(
                d_down_weight, d_down_bias, d_down, text, text_stride, image, image_stride,
                projected, B, DOWN, D, PRECISION, BLOCK, BLOCK_K,
            )  # fmt: skip
    elif tl.program_id(1) == 1:
        if d_down_weight_2 is not None or d_down_bias_2 is not None:
            _of_linear(
                d_down_weight_2, d_down_bias_2, d_x, down, DOWN, None, 0,
                projected + B, 0, E, DOWN, PRECISION, BLOCK, BLOCK_K,
            )  # fmt: skip
    else:
        if d_in_weight is not None or d_in_bias is not None:
            _of_linear(
                d_in_weight, d_in_bias, d_qkv, x, E, None, 0,
                projected + B, 0, 3 * E, E, PRECISION, BLOCK, BLOCK_K,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=["C", "B", "n_up_texts", "n_u", "n_tiles", "first_blend", "last_blend"]
)
def up_kernel(
    d_inner_weight,
    d_inner_bias,
    d_last_weight,
    d_last_bias,
    d_blend,
    d_scale,
    d_hidden,
    d_z,
    attended,
    values,
    mixed,
    last_weight,
    last_bias,
    features,
    d_gram,
    e,
    d_u,
    of_scalars,
    blends,
    hidden_stride,
    C,
    B,
    n_up_texts,
    n_u,
    n_tiles,
    first_blend,
    last_blend,
    D,
    E,
    H,
    R,
    TEXT: tl.constexpr,
    IMAGE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Each gradient where its pointer is not None; program 1 chooses the layer, or the numbers.

    d_hidden [C + B, hidden_stride] is as d_pairs_kernel's parts sum up; u = W e + b are n_u rows.
    """
    if tl.program_id(1) == 0:
        if d_inner_weight is not None or d_inner_bias is not None:
            _of_inner(
                d_inner_weight, d_inner_bias, d_hidden, hidden_stride, d_z, attended, values,
                mixed, C, B, n_up_texts, n_u, E, H, R, TEXT, IMAGE,
                PRECISION, BLOCK, BLOCK_K, BLOCK_H,
            )  # fmt: skip
    elif tl.program_id(1) == 1:
        if d_last_weight is not None or d_last_bias is not None:
            _of_last(
                d_last_weight, d_last_bias, last_weight, last_bias, features, d_hidden,
                hidden_stride, d_gram, e, d_u, C + B, n_u, D, H, R, PRECISION, BLOCK, BLOCK_K,
            )  # fmt: skip
    elif tl.program_id(0) == 0:
        if d_scale is not None:
            total = _sum_scalars(of_scalars, 2, n_tiles)
            tl.store(d_scale, total.to(d_scale.dtype.element_ty))
        if d_blend is not None:
            total = _sum_scalars(of_scalars + 1, 2, n_tiles)
            if blends is not None:
                total += _sum_scalars(blends + first_blend, 1, last_blend - first_blend)
            tl.store(d_blend, total.to(d_blend.dtype.element_ty))


@triton.jit
def compose_kernel(
    d_inner_weight,
    d_inner_bias,
    out_weight,
    out_bias,
    up_weight,
    d_out_weight,
    d_out_bias,
    d_up_weight,
    d_up_bias,
    E,
    R,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """From those of up out [R, E] and its bias the gradients of both; program 1 chooses which."""
    rows, cols, first = _tile(E, BLOCK)
    in_cols = cols < E
    tile = tl.zeros([BLOCK, BLOCK], tl.float32)
    if tl.program_id(1) == 0:
        in_rows = rows < R
        if d_up_weight is not None:
            tile = multiply(
                tile, d_inner_weight, rows * E, in_rows, 1, out_weight, cols * E, in_cols, 1, E,
                PRECISION, BLOCK_K,
            )  # fmt: skip
            d_bias = tl.load(d_inner_bias + rows, mask=in_rows, other=0.0)
            constant = tl.load(out_bias + cols, mask=in_cols, other=0.0).to(tl.float32)
            tile += d_bias[:, None] * constant[None, :]
            _store(d_up_weight, rows, cols, R, E, tile)
        if d_up_bias is not None and first:
            d_bias = tl.load(d_inner_bias + rows, mask=in_rows, other=0.0)
            tl.store(d_up_bias + rows, d_bias.to(d_up_bias.dtype.element_ty), mask=in_rows)
    else:
        in_rows = rows < E
        if d_out_weight is not None:
            tile = multiply(
                tile, up_weight, rows, in_rows, E, d_inner_weight, cols, in_cols, E, R,
                PRECISION, BLOCK_K,
            )  # fmt: skip
            _store(d_out_weight, rows, cols, E, E, tile)
        if d_out_bias is not None and first:
            total = column(up_weight, E, d_inner_bias, 1, rows, in_rows, R, BLOCK)
            tl.store(d_out_bias + rows, total.to(d_out_bias.dtype.element_ty), mask=in_rows)

"""The ops: what is launched, on what."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ...ops.sequence_fusion import allocate_forward, allocate_gradients
from ..launch import guard, processors
from . import tiles
from .backward import factors_kernel, inputs_kernel, reduce_kernel, tokens_kernel
from .call import each_dtype, odd, of_one_dtype, problem, total
from .forward import combine_kernel, fuse_kernel


def sequence_fusion_forward(
    inputs: Sequence[Tensor],
    residual: Tensor | None,
    down_weights: Sequence[Tensor],
    down_biases: Sequence[Tensor],
    time_factors: Sequence[Tensor],
    feature_factors: Sequence[Tensor],
    lengths: Tensor | None,
    activation: int,
    compute_dtype: int,
    out_dtype: int,
    summed: bool,
    add_leading: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastadapters::sequence_fusion_forward``."""
    p = problem(inputs, down_weights, time_factors, feature_factors, lengths, compute_dtype, summed)
    device = inputs[0].device
    y, products, z = allocate_forward(
        inputs, down_weights, time_factors, feature_factors, compute_dtype, out_dtype, summed, save
    )
    if y.numel() == 0:
        return y, products, z
    if residual is not None and residual.stride(-1) != 1:
        residual = residual.contiguous()
    given = [b.numel() > 0 for b in down_biases]
    biases = None
    if any(given):
        like = down_biases[given.index(True)]
        biases = of_one_dtype([b if g else like for b, g in zip(down_biases, given, strict=True)])

    tile = p.token_tile(combine_kernel)
    splits = [triton.cdiv(t, tile.block_m) for t in p.tokens]
    partials = products
    if max(splits) > 1 or not save:
        partials = products.new_empty(max(splits), total([p.products]))
    partial_stride = partials.stride(0) if partials.dim() > 1 else 0
    with guard(device):
        for xs, own in each_dtype(p.xs):
            counts = [n if o else 0 for n, o in zip(splits, own, strict=True)]
            p.launch(
                combine_kernel,
                (p.items * sum(counts),),
                tile,
                xs,
                p.down_weights,
                biases,
                p.time_factors,
                p.lengths,
                partials,
                z if save else None,
                partial_stride,
                odd(counts),
                odd(p.tokens),
                p.dims,
                p.widths,
                p.factor_tokens,
                p.strides(0),
                p.strides(1),
                p.items,
                sum(counts),
                p.time_ranks,
                p.out_len,
                p.rank_out,
                BIASES=sum(g << m for m, g in enumerate(given)),
                ACTIVATION=activation,
                SUMMED=summed and p.time_ranks > 1,
                BLOCK_O=tiles.BLOCK_O,
            )
        tile = p.row_tile(fuse_kernel)
        p.launch(
            fuse_kernel,
            (triton.cdiv(p.rows, tile.block_m), triton.cdiv(p.dim, tile.block_d)),
            tile,
            partials,
            products if save and partials is not products else None,
            residual,
            p.xs,
            p.feature_factors,
            p.lengths,
            y,
            partial_stride,
            odd(splits),
            odd(p.tokens),
            p.dims,
            p.widths,
            p.strides(0),
            p.strides(1),
            *((0, 0) if residual is None else residual.stride()[:2]),
            p.rows,
            p.items,
            p.rank,
            p.feature_ranks,
            p.out_len,
            p.dim,
            ADD_LEADING=add_leading,
            SUMMED=summed and p.feature_ranks > 1,
        )
    return y, products, z


def _reducible(gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors to reduce into, all of one dtype: of fp32 where the gradients differ."""
    if len({t.dtype for t in gradients}) > 1:
        return tuple(t.new_empty(t.shape, dtype=torch.float32) for t in gradients)
    return tuple(gradients)


def sequence_fusion_backward(
    dy: Tensor,
    inputs: Sequence[Tensor],
    products: Tensor,
    z: Tensor,
    down_weights: Sequence[Tensor],
    down_biases: Sequence[Tensor],
    time_factors: Sequence[Tensor],
    feature_factors: Sequence[Tensor],
    lengths: Tensor | None,
    activation: int,
    compute_dtype: int,
    out_dtype: int,
    summed: bool,
    add_leading: bool,
    needs: int,
) -> list[Tensor]:
    """``fastadapters::sequence_fusion_backward``."""
    modalities = len(inputs)
    parameters = down_weights, down_biases, time_factors, feature_factors
    gradients = allocate_gradients(inputs, parameters, needs)
    if dy.numel() == 0:
        return [t.zero_() for t in gradients]
    p = problem(inputs, down_weights, time_factors, feature_factors, lengths, compute_dtype, summed)
    if dy.stride(-1) != 1:
        dy = dy.contiguous()
    mask = (1 << modalities) - 1
    of_x, of_weight, of_bias, of_time, of_feature = (
        needs >> modalities * i & mask for i in range(5)
    )
    of_bias &= sum((b.numel() > 0) << m for m, b in enumerate(down_biases))
    of_dz = of_x | of_weight | of_bias
    device = dy.device
    most = 2 * processors(device)  # programs, where their number is free

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=device)

    sizes = (
        tuple(r * d for r, d in zip(p.widths, p.dims, strict=True)),
        p.widths,
        tuple(p.rank_out * t for t in p.factor_tokens),
        tuple(p.rank * r * p.dim for r in p.widths),
    )
    slab_sizes = tuple(map(total, sizes))
    slabs: list[Tensor | None] = [None] * len(sizes)
    slab_counts = [odd([0] * modalities)] * len(sizes)

    with guard(device):
        if of_dz | of_time | of_feature:
            tile = p.row_tile(factors_kernel)
            row_blocks = triton.cdiv(p.rows, tile.block_m)
            blocks = modalities * p.rank * p.padded_r // p.block_r
            column_blocks = triton.cdiv(p.dim, tile.block_d)
            chunk = triton.cdiv(
                column_blocks, max(1, min(most // (row_blocks * blocks), column_blocks))
            )
            chunks = triton.cdiv(column_blocks, chunk)
            d_products = empty(chunks, total([p.products]))
            if of_feature:
                slabs[3] = empty(row_blocks, slab_sizes[3])
                slab_counts[3] = odd([row_blocks] * modalities)
            p.launch(
                factors_kernel,
                (row_blocks, blocks, chunks),
                tile,
                dy,
                products,
                p.feature_factors,
                d_products,
                slabs[3],
                d_products.stride(0),
                slab_sizes[3],
                p.widths,
                *dy.stride()[:2],
                p.rows,
                chunk * tile.block_d,
                p.rank,
                p.feature_ranks,
                p.out_len,
                p.dim,
                TIMES=of_dz | of_time,
                FEATURES=of_feature,
                SUMMED=summed and p.feature_ranks > 1,
            )
        dz = torch.empty(z.numel() if of_dz else 0, dtype=p.dtype, device=device)
        if of_dz | of_time:
            tile = p.token_tile(tokens_kernel)
            counts = [
                triton.cdiv(longest if of_time >> m & 1 else t, tile.block_m)
                if (of_dz | of_time) >> m & 1
                else 0
                for m, (t, longest) in enumerate(zip(p.tokens, p.factor_tokens, strict=True))
            ]
            blocks = triton.cdiv(p.rank_out, tiles.BLOCK_O) if of_time else 1
            groups = max(1, min(most // (sum(counts) * blocks), p.items))
            group = triton.cdiv(p.items, groups)
            groups = triton.cdiv(p.items, group)
            if of_time:
                slabs[2] = empty(groups, slab_sizes[2])
                slab_counts[2] = odd([groups] * modalities)
            p.launch(
                tokens_kernel,
                (sum(counts), groups, blocks),
                tile,
                z,
                d_products,
                p.time_factors,
                p.lengths,
                dz if of_dz else None,
                slabs[2],
                d_products.stride(0),
                slab_sizes[2],
                odd(counts),
                odd(p.tokens),
                p.widths,
                p.factor_tokens,
                p.items,
                group,
                chunks,
                p.time_ranks,
                p.out_len,
                p.rank_out,
                ACTIVATION=activation,
                SUMMED=summed and p.time_ranks > 1,
                BLOCK_O=tiles.BLOCK_O,
            )
        if of_dz:
            tile = p.token_tile(inputs_kernel)
            token_tiles = [p.items * triton.cdiv(t, tile.block_m) for t in p.tokens]
            columns = [
                triton.cdiv(d, tile.block_d) * p.padded_r // p.block_r if of_dz >> m & 1 else 0
                for m, d in enumerate(p.dims)
            ]
            work = sum(t * c for t, c in zip(token_tiles, columns, strict=True))
            share = triton.cdiv(work, most)
            splits = [triton.cdiv(t, share) for t in token_tiles]
            for kind, wanted in enumerate((of_weight, of_bias)):
                if wanted:
                    slabs[kind] = empty(max(splits), slab_sizes[kind])
                    slab_counts[kind] = odd(splits)
            dxs = [g if g.numel() else x for g, x in zip(gradients[:modalities], p.xs, strict=True)]
            for (xs, own), (outs, _) in zip(each_dtype(p.xs), each_dtype(dxs), strict=True):
                counts = [s * c if o else 0 for s, c, o in zip(splits, columns, own, strict=True)]
                p.launch(
                    inputs_kernel,
                    (sum(counts),),
                    tile,
                    xs,
                    outs,
                    dz,
                    dy,
                    p.down_weights,
                    p.lengths,
                    slabs[0],
                    slabs[1],
                    slab_sizes[0],
                    slab_sizes[1],
                    odd(counts),
                    odd(p.tokens),
                    p.dims,
                    p.widths,
                    p.strides(0),
                    p.strides(1),
                    *dy.stride()[:2],
                    p.items,
                    share,
                    p.out_len,
                    INPUTS=of_x,
                    WEIGHTS=of_weight,
                    BIASES=of_bias,
                    ADD_LEADING=add_leading,
                )
        wanted = of_weight, of_bias, of_time, of_feature
        if any(wanted):
            found = [gradients[modalities * i : modalities * (i + 1)] for i in range(1, 5)]
            outs = [_reducible(group) for group in found]
            blocks = max(max(s) for s, w in zip(sizes, wanted, strict=True) if w)
            reduce_kernel[(triton.cdiv(blocks, tiles.REDUCE_BLOCK), 4 * modalities)](
                tuple(dy if s is None else s for s in slabs),
                tuple(outs),
                slab_sizes,
                tuple(slab_counts),
                sizes,
                (1, 1, p.time_ranks // p.rank, p.feature_ranks // p.rank),
                WANTED=wanted,
                BLOCK_D=tiles.REDUCE_BLOCK,
            )
            for group, out in zip(found, outs, strict=True):
                for gradient, t in zip(group, out, strict=True):
                    if gradient is not t:
                        gradient.copy_(t)
    return gradients

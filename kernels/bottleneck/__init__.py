"""The adapter bottleneck in Triton, for NVIDIA and AMD: forward, and backward without atomics.

Forward: a program owns BLOCK_M rows. x streams by in blocks of D and is contracted to z
[BLOCK_M, r], which stays in registers through activation and dropout; then y streams out, and x is
read again, from L2, where it is the residual. Backward: one pass takes z as saved (with LayerNorm
it recomputes it from x), contracts dy to dh and writes dx and the small dz and h [M, r]; a second
contracts x and dy with these, each program over a range of rows; the last adds the ranges in order
and forms every parameter's gradient.

D_out may differ from D. Dropout of the input is drawn again wherever x is read; behind LayerNorm it
leaves no sum over D that could be folded into a product: backward takes one more pass over D.

With an adapter per row parameters are stacked, and a program takes a tile of rows of one adapter:
rows are put in the order of their adapters, whose tiles and, for the gradients of the parameters,
ranges are in tables as long as they may have to be. x, residual, y, dy and dx stay where they are;
what passes between the kernels lies in that order.

The row m of a tensor [n0, n1, n2, D] lies at any three strides. R is r rounded up to a multiple of
BLOCK_R; where there are several blocks of R, h and dz pass through memory. Products accumulate in
fp32, and vectors are widened to fp32 as they are loaded.
"""

from .ops import (
    bottleneck_backward,
    bottleneck_backward_out,
    bottleneck_forward,
    bottleneck_forward_out,
    grouped_backward,
    grouped_forward,
)

__all__ = [
    "bottleneck_backward",
    "bottleneck_backward_out",
    "bottleneck_forward",
    "bottleneck_forward_out",
    "grouped_backward",
    "grouped_forward",
]

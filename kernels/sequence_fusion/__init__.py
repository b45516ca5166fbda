"""Low-rank sequence fusion in Triton, for NVIDIA and AMD: forward, and backward without atomics.

Forward: a program owns BLOCK_M tokens of one item and modality. x streams by in blocks of D_m and
is contracted to z [BLOCK_M, r], which stays in registers through the activation and the product
with A: a partial sum of P [R T_o, r], since the tokens are split over programs. A second kernel
adds these in order, forms the factors P U tile by tile, multiplies them over the modalities and
writes y.

Backward starts from P and z. One kernel takes dy back to P and U, of all modalities at once; one
takes dP to dz and to A; one reads x for dWd and writes dx, from one tile of dz; the last adds the
partial sums of every parameter's gradient in order. R T_o is one axis of A and P wherever that
can be; R in the kernels' constants is r rounded up to a multiple of BLOCK_R.
"""

from .ops import sequence_fusion_backward, sequence_fusion_forward

__all__ = ["sequence_fusion_backward", "sequence_fusion_forward"]

"""Cross-modal attention in Triton, for NVIDIA and AMD: forward, and backward without atomics.

Forward: attention of the texts over the texts, once where all items share them; for each item its
texts over its images on top of that, by an online softmax that goes on where the first one ended;
the image queries of all items over the texts as one matrix, then over their own images. Backward:
the texts' weights of each item's images, which leaves for their keys a gradient summed over the
items; then the gradients of queries, each program owning some, and of keys, likewise.

Scores are in units of log 2. A softmax is kept as its maximum and the reciprocal of its sum. Rows
are text queries [groups, C], a group being what shares texts, and image queries [B, I].
"""

from .ops import cross_modal_attention_backward, cross_modal_attention_forward

__all__ = ["cross_modal_attention_backward", "cross_modal_attention_forward"]

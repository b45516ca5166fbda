"""The multi-modal adapter's head in Triton, for NVIDIA and AMD: features to logits, and back.

All products are of fp32 tiles, in IEEE arithmetic unless PyTorch's setting allows TF32; what is
stored in 16 bits is widened as it is loaded. There are no atomics: sums over texts or images are of
parts in a fixed order.

Forward, 9 launches: the products of weights; down-sampler, queries, keys and values of texts and
images together; attention over the texts, of both; the layer behind it; the up-sampler and the
blend of whole rows, as unit vectors; the products of all texts with all images; and the logits.
What a text becomes that sees texts and image depends on the pair: only its products are computed,
from its hidden vector in registers. Where it depends on the text or on the image alone, it is a row
like any other, and the logits come from products of unit rows.

Backward, at most 17 launches, goes the same way back. The gradient of a pair is formed again, in
registers, and summed over the texts and images of a tile.
"""

from .backward import multimodal_logits_backward
from .forward import multimodal_logits_forward

__all__ = ["multimodal_logits_backward", "multimodal_logits_forward"]

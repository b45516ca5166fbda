"""The namespace of the compiled ops.

All others ask here, and import each other relatively, so that several builds of the package can be
loaded side by side: kernel-builder, which builds it for Hugging Face's `kernels`, puts a module
with these two names in the place of this one.
"""

import torch

ops = torch.ops.fastadapters


def add_op_namespace_prefix(op_name: str) -> str:
    """An op's name as the dispatcher has it."""
    return f"fastadapters::{op_name}"

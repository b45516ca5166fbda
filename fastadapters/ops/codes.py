"""How the ops name activations and dtypes in their options."""

import torch

from ..reference.bottleneck import ACTIVATIONS

# The codes of csrc's enum Activation.
ACTIVATION_NAMES = tuple(ACTIVATIONS)
ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATION_NAMES)}

# The codes of csrc's enum Dtype.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}

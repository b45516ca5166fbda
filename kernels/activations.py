"""The activations and their derivatives, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

# Positions in fastadapters.ops.codes.ACTIVATION_NAMES.
IDENTITY = tl.constexpr(0)
RELU = tl.constexpr(1)
GELU = tl.constexpr(2)
GELU_TANH = tl.constexpr(3)
SILU = tl.constexpr(4)
QUICK_GELU = tl.constexpr(5)


@triton.jit
def gate(z, ACTIVATION: tl.constexpr):
    """g and g' of the activations of the form z * sigmoid(g(z)); 1 + tanh(u) is 2 sigmoid(2 u)."""
    if ACTIVATION == SILU:
        return z, 1.0
    elif ACTIVATION == QUICK_GELU:
        return 1.702 * z, 1.702
    else:
        tl.static_assert(ACTIVATION == GELU_TANH)
        square = z * z
        return z * (1.5957691216057308 + 0.07135481627260025 * square), (
            1.5957691216057308 + 0.21406444881780076 * square
        )


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == IDENTITY:
        return z
    elif ACTIVATION == RELU:
        return tl.where(z <= 0.0, 0.0, z)  # a NaN stays
    elif ACTIVATION == GELU:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        g, _ = gate(z, ACTIVATION)
        return z * tl.sigmoid(g)


@triton.jit
def activation_backward(dh, z, ACTIVATION: tl.constexpr):
    """dh act'(z); relu selects, so that an infinite dh is dropped where z <= 0."""
    if ACTIVATION == IDENTITY:
        return dh
    elif ACTIVATION == RELU:
        return tl.where(z <= 0.0, 0.0, dh)
    elif ACTIVATION == GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return dh * (0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density)
    else:
        g, _ = gate(z, ACTIVATION)
        s = tl.sigmoid(g)
        # Further out s (1 - s) is 0, and a slope too large for fp32 would make it NaN.
        near = tl.minimum(tl.maximum(z, -128.0), 128.0)
        _, slope = gate(near, ACTIVATION)
        return dh * (s + near * slope * s * (1.0 - s))

// The activations and their derivatives, in fp32, vector by vector.
#pragma once

#include "gelu.h"

namespace fastadapters::cpu {
namespace {

// Minimax polynomials; the relative error of each function is below 2 ulp.

// 0 where the result would be subnormal.
inline Vec exp(Vec x) {
  Vec shifted = x * 1.44269504f + 0x1.8p23f;  // the integer part lands in the low mantissa bits
  Vec n = shifted - 0x1.8p23f;
  Vec f = x - n * 0.693145752f - n * 1.42860677e-6f;
  Vec p = broadcast(1.39560571e-3f);
  p = p * f + 8.37513497e-3f;
  p = p * f + 4.16660836e-2f;
  p = p * f + 1.66664154e-1f;
  p = p * f + 5.00000017e-1f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  p = (Vec)((Word)p + ((Word)shifted << 23));
  p = x < -87.33f ? Vec{} : p;
  return x > 88.72f ? broadcast(__builtin_inff()) : p;
}

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

// silu, quick_gelu and gelu_tanh are all z * sigmoid(t(z)).
inline Activated gated(Vec z, Vec t, Vec dt) {
  Vec gate = sigmoid(t);
  return {z * gate, gate + z * gate * (1.0f - gate) * dt};
}

inline Activated activate(Activation activation, Vec z) {
  switch (activation) {
    case Activation::relu:
      return {z <= 0 ? Vec{} : z, z <= 0 ? Vec{} : broadcast(1)};
    case Activation::gelu:
      return gelu(z);
    case Activation::gelu_tanh: {
      Vec near = z < -16  ? broadcast(-16)
                 : z > 16 ? broadcast(16)
                          : z;  // the gate is 0 or 1 beyond
      Vec s = near * near;
      return gated(z, near * (1.59576912f + 0.0713548162f * s), 1.59576912f + 0.214064449f * s);
    }
    case Activation::silu:
      return gated(z, z, broadcast(1));
    case Activation::quick_gelu:
      return gated(z, 1.702f * z, broadcast(1.702f));
    default:
      return {z, broadcast(1)};
  }
}

// The gradient by z from the one by the value. relu selects: what it stops may be infinite.
inline Vec backpropagate(Activation activation, Vec z, const Activated& at_z, Vec gradient) {
  if (activation == Activation::relu) return z <= 0 ? Vec{} : gradient;
  return gradient * at_z.derivative;
}

}  // namespace
}  // namespace fastadapters::cpu

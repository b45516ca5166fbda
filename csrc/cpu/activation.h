// The activations and their derivatives, in fp32, vector by vector.
#pragma once

#include "simd.h"

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

inline Vec erf(Vec x) {
  Vec magnitude = x < 0 ? -x : x;
  Vec s = x * x;
  Vec p = broadcast(-6.01303356e-4f);
  p = p * s + 4.99793189e-3f;
  p = p * s - 2.67701857e-2f;
  p = p * s + 1.12819262e-1f;
  p = p * s - 3.76125067e-1f;
  p = p * s + 1.28379151e-1f;
  Vec small = x + x * p;
  Vec t = magnitude > 4.0f ? broadcast(4.0f) : magnitude;
  Vec q = broadcast(2.14155967e-4f);  // log(erfc(t)) / t
  q = q * t - 3.21646757e-3f;
  q = q * t + 2.28951742e-2f;
  q = q * t - 1.05270575e-1f;
  q = q * t - 6.35711193e-1f;
  q = q * t - 1.12851667f;
  Vec large = 1.0f - exp(q * t);
  return magnitude < 0.92f ? small : x < 0 ? -large : large;
}

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

struct Activated {
  Vec value, derivative;
};

// silu, quick_gelu and gelu_tanh are all z * sigmoid(t(z)).
inline Activated gated(Vec z, Vec t, Vec dt) {
  Vec gate = sigmoid(t);
  return {z * gate, gate + z * gate * (1.0f - gate) * dt};
}

inline Activated activate(Activation activation, Vec z) {
  switch (activation) {
    case Activation::relu:
      return {z <= 0 ? Vec{} : z, z <= 0 ? Vec{} : broadcast(1)};
    case Activation::gelu: {
      Vec phi = 0.398942280f * exp(-0.5f * z * z);
      Vec cdf = 0.5f + 0.5f * erf(0.707106781f * z);
      return {z * cdf, cdf + z * phi};
    }
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

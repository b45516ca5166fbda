// 2^y, and the exact GELU with its derivative from one exponential, in fp32.
#pragma once

#include "activation.h"

namespace fastadapters::cpu {
namespace {

// 2^(x * factor), for -126 <= x * factor <= 127: the product is not rounded where there are fused
// multiply-adds; the rest has a relative error below 1 ulp.
inline Vec power_of_two(Vec x, float factor) {
  Vec shifted = x * factor + 0x1.8p23f;  // the integer part lands in the low mantissa bits
  Vec f = x * factor - (shifted - 0x1.8p23f);
  Vec p = broadcast(1.53458313e-4f);
  p = p * f + 1.33999414e-3f;
  p = p * f + 9.61848907e-3f;
  p = p * f + 5.55032864e-2f;
  p = p * f + 2.40226462e-1f;
  p = p * f + 6.93147182e-1f;
  p = p * f + 1.0f;
  return (Vec)((Word)p + ((Word)shifted << 23));
}

inline Vec square_root(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_sqrt_ps(__mmask16(-1), (__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// z * cdf(z) with cdf(-|z|) = t P(t) exp(-z^2 / 2), t = 1 / (1 + p |z|): 2e-8 of it at most.
inline Activated gelu(Vec z) {
  Vec a = z < 0 ? -z : z;
  a = a > 13.0f ? broadcast(13) : a;  // the tail is 0 from there on; NaN stays
  Vec t = 1.0f / (0.27f * a + 1.0f);
  Vec p = broadcast(2.87779570e-2f);
  p = p * t - 1.25561982e-1f;
  p = p * t + 1.67798027e-1f;
  p = p * t - 6.68323115e-2f;
  p = p * t + 1.06099561e-1f;
  p = p * t + 7.28257969e-2f;
  p = p * t + 1.01599917e-1f;
  p = p * t + 1.07574366e-1f;
  p = p * t + 1.07718676e-1f;
  Vec bell = power_of_two(a * a, -0.721347520f);
  Vec tail = p * t * bell;
  Vec cdf = z < 0 ? tail : 1.0f - tail;
  return {(z > 0 ? z : Vec{}) - a * tail, cdf + z * (bell * 0.398942280f)};
}

}  // namespace
}  // namespace fastadapters::cpu

// 2^y, and the exact GELU with its derivative from one exponential, in fp32.
#pragma once

#include "simd.h"

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

struct Activated {
  Vec value, derivative;
};

// z * cdf(z) with cdf(-|z|) = P(u) exp(-z^2 / 2), u = |z| / (|z| + 4): 2e-8 of it at most. u,
// unlike 1 - u, is exact where |z| is small.
inline Activated gelu(Vec z) {
  // Beyond, the tail is 0, and power_of_two has no result. NaN stays.
  Vec near = larger(broadcast(-13.2f), smaller(broadcast(13.2f), z)), a = absolute(near);
  Vec u = a / (a + 4.0f);
  Vec p = broadcast(-0.0352129303f);
  p = p * u + 0.113954015f;
  p = p * u - 0.0547400713f;
  p = p * u - 0.203958303f;
  p = p * u + 0.106975809f;
  p = p * u + 0.870830357f;
  p = p * u - 2.10631824f;
  p = p * u + 2.40421176f;
  p = p * u - 1.59576857f;
  p = p * u + 0.5f;
  Vec bell = a < 13.2f ? power_of_two(a * a, -0.721347520f) : Vec{};
  Vec tail = p * bell;
  Vec cdf = z < 0 ? tail : 1.0f - tail;
  return {larger(z, Vec{}) - a * tail, cdf + near * (bell * 0.398942280f)};
}

}  // namespace
}  // namespace fastadapters::cpu

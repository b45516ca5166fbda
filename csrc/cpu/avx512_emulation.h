// AVX-512 and AVX512-BF16 on a CPU that has AVX2. Tests put this file in front (-include) of the
// source files of those instruction sets, so that their kernels, with their 16 lanes, run, and are
// checked by the sanitizers, on machines without them. The vector extensions that the kernels are
// written in need no instruction set; here are the intrinsics beside them. Same results bit for bit
// (Intel SDM).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace fastadapters::cpu {
namespace {

typedef uint32_t Words16 __attribute__((vector_size(64)));
typedef uint16_t Halves16 __attribute__((vector_size(32)));

struct TwoHalves {
  __m256 low, high;
};

inline TwoHalves split(__m512 v) {
  TwoHalves halves;
  std::memcpy(&halves, &v, sizeof v);
  return halves;
}

inline __m512 join(const TwoHalves& halves) {
  __m512 v;
  std::memcpy(&v, &halves, sizeof v);
  return v;
}

// Reads what the mask has a bit for, and nothing else.
inline __m512 emulate_maskz_loadu(uint32_t mask, const float* p) {
  __m512 v = {};
  for (int lane = 0; lane < 16; ++lane)
    if (mask >> lane & 1) v[lane] = p[lane];
  return v;
}

inline __m512i emulate_mul_epu32(__m512i a, __m512i b) {
  typedef uint64_t Words8 __attribute__((vector_size(64)));
  return (__m512i)(((Words8)a & 0xffffffff) * ((Words8)b & 0xffffffff));
}

inline __m512 emulate_sqrt(__m512 v) {
  TwoHalves half = split(v);
  return join({_mm256_sqrt_ps(half.low), _mm256_sqrt_ps(half.high)});
}

inline __m512 emulate_max(__m512 a, __m512 b) {
  TwoHalves x = split(a), y = split(b);
  return join({_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high)});
}

inline __m512 emulate_min(__m512 a, __m512 b) {
  TwoHalves x = split(a), y = split(b);
  return join({_mm256_min_ps(x.low, y.low), _mm256_min_ps(x.high, y.high)});
}

inline __m512 emulate_cvtph(__m256i v) {
  __m128i half[2];
  std::memcpy(half, &v, sizeof v);
  return join({_mm256_cvtph_ps(half[0]), _mm256_cvtph_ps(half[1])});
}

// To the nearest, the one rounding that is used.
inline __m256i emulate_cvtps_ph(__m512 v) {
  TwoHalves wide = split(v);
  __m128i half[2] = {_mm256_cvtps_ph(wide.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                     _mm256_cvtps_ph(wide.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  __m256i narrow;
  std::memcpy(&narrow, half, sizeof narrow);
  return narrow;
}

inline Words16 flush_subnormals(Words16 v) { return (v & 0x7f800000) == 0 ? v & 0x80000000 : v; }

// Subnormals count as zero, NaN stays NaN.
__attribute__((noinline)) inline Halves16 emulate_cvtneps_pbh(__m512 v) {
  Words16 bits = flush_subnormals((Words16)v);
  Words16 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded,
                                 Halves16);
}

// a b + c, rounded once; subnormals count as zero, before and after.
inline Words16 flushing_multiply_add(Words16 a, Words16 b, Words16 c) {
  TwoHalves x = split((__m512)flush_subnormals(a)), y = split((__m512)flush_subnormals(b));
  TwoHalves z = split((__m512)flush_subnormals(c));
  __m512 sum =
      join({_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)});
  return flush_subnormals((Words16)sum);
}

// The products of the odd values are added first.
__attribute__((noinline)) inline __m512 emulate_dpbf16(__m512 c, __m512bh a, __m512bh b) {
  Words16 x = (Words16)a, y = (Words16)b;
  Words16 odd = flushing_multiply_add(x & 0xffff0000, y & 0xffff0000, (Words16)c);
  return (__m512)flushing_multiply_add(x << 16, y << 16, odd);
}

}  // namespace
}  // namespace fastadapters::cpu

#define __AVX512F__ 1
#define __AVX512BF16__ 1
#undef _mm512_maskz_loadu_ps
#undef _mm512_mul_epu32
#undef _mm512_maskz_sqrt_ps
#undef _mm512_maskz_max_ps
#undef _mm512_maskz_min_ps
#undef _mm512_maskz_cvtph_ps
#undef _mm512_maskz_cvtps_ph
#undef _mm512_cvtneps_pbh
#undef _mm512_dpbf16_ps
#define _mm512_maskz_loadu_ps(mask, p) fastadapters::cpu::emulate_maskz_loadu(mask, p)
#define _mm512_mul_epu32(a, b) fastadapters::cpu::emulate_mul_epu32(a, b)
#define _mm512_maskz_sqrt_ps(mask, v) fastadapters::cpu::emulate_sqrt(v)
#define _mm512_maskz_max_ps(mask, a, b) fastadapters::cpu::emulate_max(a, b)
#define _mm512_maskz_min_ps(mask, a, b) fastadapters::cpu::emulate_min(a, b)
#define _mm512_maskz_cvtph_ps(mask, v) fastadapters::cpu::emulate_cvtph(v)
#define _mm512_maskz_cvtps_ph(mask, v, rounding) fastadapters::cpu::emulate_cvtps_ph(v)
#define _mm512_cvtneps_pbh(v) fastadapters::cpu::emulate_cvtneps_pbh(v)
#define _mm512_dpbf16_ps(c, a, b) fastadapters::cpu::emulate_dpbf16(c, a, b)

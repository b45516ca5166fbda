// One vector of fp32 lanes, as wide as this translation unit's instruction set allows. Everything
// is in an unnamed namespace: each instruction set compiles its own copy of these headers, and the
// linker must not merge them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../tensors.h"

#define FASTADAPTERS_INLINED __attribute__((always_inline))
#define FASTADAPTERS_INLINE inline FASTADAPTERS_INLINED

namespace fastadapters::cpu {
namespace {

#if defined(__AVX2__)
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
typedef int64_t Long __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Word __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

// Calls f with n, from 1 to `most`, as a compile-time constant.
template <int most, class F>
FASTADAPTERS_INLINE void with_constant(int64_t n, const F& f) {
  if constexpr (most > 1)
    if (n < most) return with_constant<most - 1>(n, f);
  f(std::integral_constant<int, most>());
}

inline Vec broadcast(float x) { return x - Vec{}; }

template <class V>
inline V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

// fp32 <-> storage type, rounding to nearest even.

inline Vec widen(const float*, Vec v) { return v; }
inline Vec widen(const bfloat16*, Half v) { return (Vec)(__builtin_convertvector(v, Word) << 16); }
inline Vec narrow(const float*, Vec v) { return v; }

inline Half narrow(const bfloat16*, Vec v) {
#if defined(__AVX512BF16__)
  return (Half)_mm512_cvtneps_pbh((__m512)v);
#else
  Word bits = (Word)v;
  Word rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : Word{} + 0x7fc0, Half);
#endif
}

inline Vec widen(const float16*, Half v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtph_ps(__mmask16(-1), (__m256i)v);
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps((__m128i)v);
#else
  Word bits = __builtin_convertvector(v, Word);
  Word magnitude = (bits & 0x7fff) << 13;
  Word finite = (Word)((Vec)magnitude * 0x1p112f);  // moves the exponent bias, subnormals included
  Word value = (bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : finite;
  return (Vec)(value | (bits & 0x8000) << 16);
#endif
}

inline Half narrow(const float16*, Vec v) {
#if defined(__AVX512F__)
  return (Half)_mm512_maskz_cvtps_ph(__mmask16(-1), (__m512)v, kNearest);
#elif defined(__AVX2__)
  return (Half)_mm256_cvtps_ph((__m256)v, kNearest);
#else
  Word bits = (Word)v, magnitude = bits & 0x7fffffff;
  Word normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 puts the last subnormal bit of a half where fp32 rounds.
  Word subnormal = (Word)((Vec)magnitude + 0.5f) - 0x3f000000;
  Word value = magnitude < 0x38800000 ? subnormal : normal;
  value = magnitude >= 0x47800000 ? Word{} + 0x7c00 : value;
  value = magnitude > 0x7f800000 ? Word{} + 0x7e00 : value;
  return __builtin_convertvector(value | (bits >> 16 & 0x8000), Half);
#endif
}

template <class T>
using Narrow = decltype(narrow((const T*)nullptr, Vec{}));

template <class T>
inline Vec load(const T* p) {
  return widen(p, read<Narrow<T>>(p));
}

template <class T>
inline void store(T* p, Vec v) {
  auto bits = narrow(p, v);
  std::memcpy(p, &bits, sizeof bits);
}

template <int... lane>
inline Int lane_numbers(std::integer_sequence<int, lane...>) {
  return Int{lane...};
}

// -1 in the first n lanes, else 0.
inline Int first_mask(int64_t n) {
  return lane_numbers(std::make_integer_sequence<int, kLanes>()) < int32_t(n);
}

// The first n of fewer than 2 * size values, at their place: no call, as of memcpy.
template <int size = kLanes / 2, class T>
FASTADAPTERS_INLINE void copy_lanes(T* to, const T* from, int64_t n) {
  if (n & size) std::memcpy(to, from, size * sizeof(T));
  if constexpr (size > 1) copy_lanes<size / 2>(to + (n & size), from + (n & size), n);
}

// The first n lanes; lanes from n on are read as 0. n may exceed the vector.
template <class T>
inline Vec load(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  if (n <= 0) return Vec{};
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return (Vec)_mm512_maskz_loadu_ps(__mmask16((1 << n) - 1), p);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) return (Vec)_mm256_maskload_ps(p, (__m256i)first_mask(n));
#endif
  T lanes[kLanes] = {};
  copy_lanes(lanes, p, n);
  return load(lanes);
}

template <class T>
inline void store(T* p, Vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  if (n > 0) copy_lanes(p, lanes, n);
}

template <class T>
inline Vec round_to(Vec v) {
  return widen((const T*)nullptr, narrow((const T*)nullptr, v));
}

// v with the lanes from n on as 0, whatever they held; n may exceed the vector.
inline Vec first_lanes(Vec v, int64_t n) { return n >= kLanes ? v : (Vec)((Int)v & first_mask(n)); }

// The larger and the smaller of two; the second one where one is NaN.
inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_max_ps(__mmask16(-1), (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
inline Vec smaller(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_min_ps(__mmask16(-1), (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
inline Vec absolute(Vec v) { return (Vec)((Int)v & 0x7fffffff); }

// Brings n values into cache level 4 - locality. Harmless beyond the end of a tensor.
template <int write, int locality, class T>
FASTADAPTERS_INLINE void prefetch_columns(const T* p, int64_t n) {
  for (int64_t j = 0; j < n; j += int64_t(64 / sizeof(T)))
    __builtin_prefetch(p + j, write, locality);
}

// Lanes of a (0 .. kLanes - 1) and b (kLanes ..) in any order.
template <size_t... lane>
inline Vec shuffle(Vec a, Vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lane...);
#else
  return __builtin_shuffle(a, b, Int{int(lane)...});
#endif
}

// f of all lanes: of each half of them, then of each half of what that gives.
template <int half = kLanes / 2, class F, size_t... lane>
FASTADAPTERS_INLINE float reduce(Vec v, const F& f, std::index_sequence<lane...> lanes) {
  v = f(v, shuffle<(lane + half) % kLanes...>(v, v));
  if constexpr (half > 1) return reduce<half / 2>(v, f, lanes);
  return v[0];
}
inline float sum(Vec v) {
  return reduce(v, [](Vec a, Vec b) { return a + b; }, std::make_index_sequence<kLanes>());
}
inline float largest(Vec v) {
  return reduce(v, [](Vec a, Vec b) { return larger(a, b); }, std::make_index_sequence<kLanes>());
}

// a0 b0 a1 b1 ... of the lower halves.
template <size_t... lane>
inline Vec interleave_low(Vec a, Vec b, std::index_sequence<lane...>) {
  return shuffle<(lane / 2 + lane % 2 * kLanes)...>(a, b);
}

// a0 + a1, a2 + a3, ..., then zeros.
template <size_t... lane>
inline Vec add_neighbours(Vec a, std::index_sequence<lane...>) {
  return shuffle<(2 * lane < kLanes ? 2 * lane : kLanes)...>(a, Vec{}) +
         shuffle<(2 * lane < kLanes ? 2 * lane + 1 : kLanes)...>(a, Vec{});
}

// Transposes kLanes x kLanes words by swapping ever larger off-diagonal blocks.

template <int distance, size_t... lane>
inline void swap_blocks(Vec& a, Vec& b, std::index_sequence<lane...>) {
#if defined(__clang__)
  Vec low = __builtin_shufflevector(a, b, (lane & distance ? kLanes + lane - distance : lane)...);
  Vec high = __builtin_shufflevector(a, b, (lane & distance ? kLanes + lane : lane + distance)...);
#else
  Vec low = __builtin_shuffle(a, b, Int{int(lane & distance ? kLanes + lane - distance : lane)...});
  Vec high =
      __builtin_shuffle(a, b, Int{int(lane & distance ? kLanes + lane : lane + distance)...});
#endif
  a = low;
  b = high;
}

template <int distance = kLanes / 2>
inline void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & distance))
      swap_blocks<distance>(rows[i], rows[i + distance], std::make_index_sequence<kLanes>());
  if constexpr (distance > 1) transpose<distance / 2>(rows);
}

// Calls f with a typed pointer to a parameter's data.
template <class F>
inline auto with_type(const Parameter& p, const F& f) {
  if (p.dtype == Dtype::float32) return f((float*)p.data);
  if (p.dtype == Dtype::bfloat16) return f((bfloat16*)p.data);
  return f((float16*)p.data);
}

}  // namespace
}  // namespace fastadapters::cpu

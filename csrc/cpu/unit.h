// What one 32-bit word of a GEMM operand holds: one fp32 value (Single), or the bf16 values of two
// consecutive k (Pair). Everything but the multiply-add moves words around without looking inside,
// so one set of kernels serves both.
#pragma once

#include "simd.h"

namespace fastadapters::cpu {
namespace {

// A word, or two, at any address in every lane.
template <class Step>
inline Vec splat(const char* p) {
  using Lanes = std::conditional_t<sizeof(Step) == 4, Int, Long>;
  return (Vec)(Lanes{} + read<Step>(p));
}

struct Single {
  using Store = float;
  static constexpr int kPerWord = 1;

  static Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
  static Vec one() { return broadcast(1); }

  // The words of row k [of k + 1 too] at kLanes columns; row(k) gives their values.
  template <class Row>
  static Vec across_rows(int64_t k, const Row& row) {
    return row(k);
  }
  // The words of one row from word k on; columns(c) gives the values from column c on.
  template <class Columns>
  static Vec along_row(int64_t k, const Columns& columns) {
    return columns(k);
  }
  static Vec interleave(const float* row, const float*) { return load(row); }
  static Vec interleave(const float* row, const float*, int64_t n) { return load(row, n); }
};

struct Pair {
  using Store = bfloat16;
  static constexpr int kPerWord = 2;

#if defined(__AVX512BF16__)
  static Vec multiply_add(Vec a, Vec b, Vec c) {
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
#endif
  static Vec one() { return (Vec)(Word{} + 0x3f803f80); }

  static Word bits(Vec v) {
    return __builtin_convertvector(narrow((const bfloat16*)nullptr, v), Word);
  }
  template <class Row>
  static Vec across_rows(int64_t k, const Row& row) {
    return (Vec)(bits(row(2 * k)) | bits(row(2 * k + 1)) << 16);
  }
  template <class Columns>
  static Vec along_row(int64_t k, const Columns& columns) {
    Half halves[2] = {narrow((const bfloat16*)nullptr, columns(2 * k)),
                      narrow((const bfloat16*)nullptr, columns(2 * k + kLanes))};
    return read<Vec>(halves);
  }
  // Two rows of whole vectors.
  static Vec interleave(const bfloat16* first, const bfloat16* second) {
#if __has_builtin(__builtin_shufflevector)  // not in GCC 11
    return zip(read<Half>(first), read<Half>(second), std::make_index_sequence<2 * kLanes>());
  }
  template <size_t... lane>
  static Vec zip(Half first, Half second, std::index_sequence<lane...>) {
    return (Vec)__builtin_shufflevector(first, second, (lane / 2 + lane % 2 * kLanes)...);
#else
    return interleave(first, second, kLanes);
#endif
  }
  // Two rows of n columns, the second one may be null (zeros).
  static Vec interleave(const bfloat16* first, const bfloat16* second, int64_t n) {
    Word low = (Word)load(first, n) >> 16;
    return (Vec)(second ? low | (Word)load(second, n) : low);
  }
};

}  // namespace
}  // namespace fastadapters::cpu

// Products of small fp32 matrices: a block of C stays in registers while k runs.
#pragma once

#include "../simd.h"

namespace fastadapters::cpu {
namespace {

constexpr int kRows = kLanes == 16 ? 8 : 6;     // of a block; A is read in whole blocks
constexpr int kColumns = kLanes == 16 ? 3 : 2;  // of a block, in vectors

template <bool columns, bool add, int vectors>
FASTADAPTERS_INLINE void multiply_block(int64_t rows, int64_t steps, const float* a, int64_t lda,
                                        const float* b, int64_t ldb, float* c, int64_t ldc) {
  Vec sum[kRows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sum[i][j] = Vec{};
  for (int64_t k = 0; k < steps; ++k, b += ldb) {
    Vec bk[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) bk[j] = read<Vec>(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      float aik = columns ? a[k * lda + i] : a[i * lda + k];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sum[i][j] += aik * bk[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
    if (i < rows)
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        float* to = c + i * ldc + j * kLanes;
        store(to, add ? read<Vec>(to) + sum[i][j] : sum[i][j]);
      }
}

// C [rows, vectors * kLanes] = A [rows, steps] B, or += where `add`. A is stored by rows, or by
// columns, lda apart; B and C by rows. The product is summed apart from what C held: over many
// calls the rounding errors grow with their number, not with the number of terms.
template <bool columns, bool add>
__attribute__((noinline)) void multiply(int64_t rows, int64_t vectors, int64_t steps,
                                        const float* a, int64_t lda, const float* b, int64_t ldb,
                                        float* c, int64_t ldc) {
  for (int64_t i = 0; i < rows; i += kRows)
    for (int64_t v = 0; v < vectors; v += kColumns) {
      with_constant<kColumns>(vectors - v, [&](auto n) {
        multiply_block<columns, add, n>(rows - i, steps, a + i * (columns ? 1 : lda), lda,
                                        b + v * kLanes, ldb, c + i * ldc + v * kLanes, ldc);
      });
    }
}

// The same for any number of steps: no sum has a chain of more than kChain additions, as a dot
// product summed in vectors has.
constexpr int64_t kChain = 48;

template <bool columns, bool add>
inline void multiply_long(int64_t rows, int64_t vectors, int64_t steps, const float* a, int64_t lda,
                          const float* b, int64_t ldb, float* c, int64_t ldc) {
  const int64_t chains = divide_up(steps, kChain);
  for (int64_t i = 0; i < chains; ++i) {
    int64_t k = steps * i / chains, n = steps * (i + 1) / chains - k;
    (i ? multiply<columns, true> : multiply<columns, add>)(rows, vectors, n,
                                                           a + k * (columns ? lda : 1), lda,
                                                           b + k * ldb, ldb, c, ldc);
  }
}

template <class F>
Vec sum_of_halves(Vec sum, int64_t begin, int64_t end, const F& f);

// `sum` and each f(i) from `begin` to `end`: a chain, or pairs of sums of chains.
template <class F>
FASTADAPTERS_INLINE Vec sum_of(Vec sum, int64_t begin, int64_t end, const F& f) {
  if (end - begin > 32) return sum_of_halves(sum, begin, end, f);
  for (int64_t i = begin; i < end; ++i) sum += f(i);
  return sum;
}

template <class F>
__attribute__((noinline)) Vec sum_of_halves(Vec sum, int64_t begin, int64_t end, const F& f) {
  int64_t middle = (begin + end) / 2;
  return sum_of(sum, begin, middle, f) + sum_of(Vec{}, middle, end, f);
}

// The sums of the lanes of each vector, in the lanes of one.
inline Vec sum_each(Vec (&v)[kLanes]) {
  transpose(v);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

}  // namespace
}  // namespace fastadapters::cpu

// Products of small matrices: a block of C stays in registers while k runs.
#pragma once

#include "../pack.h"

namespace fastadapters::cpu {
namespace {

// A packed B is made of these panels of columns (gemm.h).
using Columns = Panels<Gemm<Single>>;

// Sums along k are made of chains of this many additions: rounding errors grow with their length.
constexpr int64_t kChain = 64;

// Enough chains of additions at a time to hide the latency of one.
template <int vectors>
constexpr int kBlockRows = vectors == 1 || kLanes == 16 ? 8 : 4;

// c[i][j] += the sum of a[i][k] * b[k * ldb + j] over `steps` k. A Step is a float, or two of them
// for a folded b.
template <class Step, int rows, int vectors>
FASTADAPTERS_INLINE void add_products(int64_t steps, const float* const (&a)[rows], const float* b,
                                      int64_t ldb, Vec (&c)[rows][vectors]) {
  for (int64_t k = 0; k < steps; ++k, b += ldb) {
    Vec bk[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) bk[j] = read<Vec>(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      Vec aik = splat<Step>((const char*)a[i] + k * sizeof(Step));
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) c[i][j] = Single::multiply_add(aik, bk[j], c[i][j]);
    }
  }
}

// c = the sum, chain by chain; before(k) comes before each.
template <class Step, int rows, int vectors, class Before>
FASTADAPTERS_INLINE void sum_products(int64_t steps, const float* const (&a)[rows], const float* b,
                                      int64_t ldb, Vec (&c)[rows][vectors], const Before& before) {
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) c[i][j] = Vec{};
  before(0);
  add_products<Step>(least(steps, kChain), a, b, ldb, c);
  for (int64_t k = kChain; k < steps; k += kChain) {
    before(k);
    asm("" : "+m"(c));  // else what c holds takes the registers that the chain needs
    Vec part[rows][vectors] = {};
    const float* rest[rows];
    for (int i = 0; i < rows; ++i) rest[i] = (const float*)((const Step*)a[i] + k);
    add_products<Step>(least(steps - k, kChain), rest, b + k * ldb, ldb, part);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) c[i][j] += part[i][j];
  }
}

// Row i of m and those behind it, the last one again where there are no more.
template <int rows, class Row>
FASTADAPTERS_INLINE void block_of_rows(int64_t i, int64_t m, const Row& row,
                                       const float* (&a)[rows]) {
#pragma GCC unroll 8
  for (int l = 0; l < rows; ++l) a[l] = row(least(i + l, m - 1));
}

// The first n rows of a block; f(v, row, vector).
template <int rows, int vectors, class F>
FASTADAPTERS_INLINE void each_vector(const Vec (&c)[rows][vectors], int64_t n, const F& f) {
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
    if (i < n)
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) f(c[i][j], i, j);
}

// C [m, n] = A [m, k] B [k, n], or += it, for n = vectors * kLanes.
template <bool add, int vectors>
void multiply_columns(int64_t m, int64_t k, const float* a, int64_t lda, const float* b,
                      int64_t ldb, float* c, int64_t ldc) {
  constexpr int rows = kBlockRows<vectors>;
  for (int64_t i = 0; i < m; i += rows) {
    const float* block[rows];
    block_of_rows(i, m, [&](int64_t row) { return a + row * lda; }, block);
    Vec sum[rows][vectors];
    sum_products<int32_t>(k, block, b, ldb, sum, [](int64_t) {});
    each_vector(sum, m - i, [&](Vec v, int l, int j) {
      float* to = c + (i + l) * ldc + j * kLanes;
      store(to, add ? read<Vec>(to) + v : v);
    });
  }
}

// The same for any number of columns. Whole vectors are written: where rows of C are shorter (only
// without `add`) a row overwrites the head of the next, which therefore comes later, and C needs
// room for one vector behind it.
template <bool add>
void multiply(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
              int64_t columns, float* c, int64_t ldc) {
  Columns n(columns);
  for (int64_t p = n.count - 1; p >= 0; --p) {
    int64_t first = n.first(p) * kLanes;
    with_vectors<Gemm<Single>>(n.size(p), [&](auto vectors) {
      multiply_columns<add, vectors>(m, k, a, lda, b + first, ldb, c + first, ldc);
    });
  }
}

// out [columns, rows] = the transpose of in [rows, columns]. Rows of `out` are filled up with zeros
// to whole vectors.
inline void transpose_into(const float* in, int64_t ld, int64_t rows, int64_t columns, float* out,
                           int64_t ld_out) {
  for (int64_t j = 0; j < columns; j += kLanes)
    for (int64_t i = 0; i < rows; i += kLanes) {
      Vec block[kLanes];
      for (int64_t l = 0; l < kLanes; ++l)
        block[l] = i + l < rows ? load(in + (i + l) * ld + j, columns - j) : Vec{};
      transpose(block);
      for (int64_t l = 0; l < least(kLanes, columns - j); ++l)
        store(out + (j + l) * ld_out + i, block[l]);
    }
}

}  // namespace
}  // namespace fastadapters::cpu

// The GEMM micro-kernel: a block of C stays in registers while k runs.
//
//     A  rows of words, k contiguous:                    a + i * lda (lda in values)
//     B  panels of at most kPanel vectors of columns:    [words of k][vectors * kLanes]
#pragma once

#include "unit.h"

namespace fastadapters::cpu {
namespace {

template <class Unit_>
struct Gemm {
  using Unit = Unit_;
  using Store = typename Unit::Store;
  static constexpr int kRows = kLanes == 16 ? 8 : 4;  // A is padded to whole blocks of rows
  static constexpr int kBlock = kRows;
  static constexpr int kPanel = 3;
  static constexpr int kDepth = 2;  // k is padded to a multiple of this many words
  static constexpr bool kFolds = true;

  struct Session {};

  // A step along k is a word, or two words for folded columns. Rows of A may lie at any address.
  template <int vectors, class Step = int32_t>
  static FASTADAPTERS_INLINE void run(int64_t steps, const Store* a, int64_t lda, const float* b,
                                      Vec (&c)[kRows][vectors]) {
    const char* row[kRows];
    for (int i = 0; i < kRows; ++i, a += lda) row[i] = (const char*)a;
    for (int64_t k = 0; k < steps; ++k, b += vectors * kLanes) {
      Vec bk[vectors];
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) bk[j] = read<Vec>(b + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        Vec aik = splat<Step>(row[i] + k * sizeof(Step));
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) c[i][j] = Unit::multiply_add(aik, bk[j], c[i][j]);
      }
    }
  }

  // One row at a time: what would be the rows of a block are chains of every kRows-th step.
  template <int vectors, class Step = int32_t>
  static __attribute__((noinline)) void run_few(int64_t rows, int64_t steps, const Store* a,
                                                int64_t lda, const float* b,
                                                Vec (&c)[kRows][vectors]) {
    for (int64_t row = 0; row < rows; ++row, a += lda) {
      Vec part[kRows][vectors] = {};
      for (int64_t k = 0; k < steps; k += kRows)
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
          if (k + i < steps) {
            Vec ak = splat<Step>((const char*)a + (k + i) * sizeof(Step));
#pragma GCC unroll 8
            for (int j = 0; j < vectors; ++j)
              part[i][j] = Unit::multiply_add(ak, read<Vec>(b + ((k + i) * vectors + j) * kLanes),
                                              part[i][j]);
          }
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) {
#pragma GCC unroll 4
        for (int half = kRows / 2; half > 0; half /= 2)
#pragma GCC unroll 8
          for (int i = 0; i < half; ++i) part[i][j] += part[i + half][j];
        c[row][j] = part[0][j];
      }
    }
  }

  // The product of a block; rows from `rows` on are anything.
  template <int vectors, class Step = int32_t>
  static FASTADAPTERS_INLINE void block(bool few, int64_t rows, int64_t steps, const Store* a,
                                        int64_t lda, const float* b, Vec (&c)[kRows][vectors]) {
    if (few) {
      Vec in_memory[kRows][vectors] = {};
      run_few<vectors, Step>(rows, steps, a, lda, b, in_memory);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) c[i][j] = in_memory[i][j];
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) c[i][j] = Vec{};
      run<vectors, Step>(steps, a, lda, b, c);
    }
  }

  // C [kBlock, vectors * kLanes] = the product.
  template <int vectors>
  static FASTADAPTERS_INLINE void product(bool few, int64_t rows, int64_t words, const Store* a,
                                          int64_t lda, const float* b, float* c, int64_t ldc) {
    Vec sum[kRows][vectors];
    block<vectors>(few, least(rows, kRows), words, a, lda, b, sum);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) store(c + i * ldc + j * kLanes, sum[i][j]);
  }

  // C [kBlock, vectors * kLanes] += the product, summed apart first: over many calls the rounding
  // errors grow with their number, not with the number of terms.
  template <int vectors>
  static FASTADAPTERS_INLINE void accumulate(bool few, int64_t rows, int64_t words, const Store* a,
                                             int64_t lda, const float* b, float* c, int64_t ldc) {
    Vec sum[kRows][vectors];
    block<vectors>(few, least(rows, kRows), words, a, lda, b, sum);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) {
        float* to = c + i * ldc + j * kLanes;
        store(to, read<Vec>(to) + sum[i][j]);
      }
  }

  // The same for a folded panel.
  static inline void accumulate_folded(bool few, int64_t rows, int64_t words, const Store* a,
                                       int64_t lda, const float* b, float* c, int64_t ldc) {
    Vec sum[kRows][1];
    block<1, int64_t>(few, least(rows, kRows), words / 2, a, lda, b, sum);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      float* to = c + i * ldc;
      store(to, read<Vec>(to) + add_neighbours(sum[i][0], std::make_index_sequence<kLanes>()));
    }
  }
};

// N columns, in vectors, split into panels as equal as possible. A packed operand or an array of
// accumulators with n rows keeps panel p at offset n * kLanes * first(p).
template <class G>
struct Panels {
  int64_t vectors, count;
  bool narrow;

  explicit Panels(int64_t columns)
      : vectors(divide_up(columns, kLanes)),
        count(divide_up(vectors, G::kPanel)),
        narrow(2 * columns <= kLanes) {}
  int64_t first(int64_t p) const { return vectors * p / count; }
  int64_t size(int64_t p) const { return first(p + 1) - first(p); }
  int64_t columns() const { return vectors * kLanes; }
};

// Folds a narrow B, packed as usual, in place: two words of k side by side for each column, where
// half of the lanes would be idle.
template <class G>
inline void fold(Panels<G> n, int64_t words, float* b) {
  if (!G::kFolds || !n.narrow) return;
  for (int64_t k = 0; k < words; k += 2)
    store(b + k / 2 * kLanes,
          interleave_low(read<Vec>(b + k * kLanes), read<Vec>(b + (k + 1) * kLanes),
                         std::make_index_sequence<kLanes>()));
}

// Calls f with the number of vectors of a panel as a compile-time constant.
template <class G, class F>
inline void with_vectors(int64_t vectors, const F& f) {
  if (vectors == 1) return f(std::integral_constant<int, 1>());
  if constexpr (G::kPanel == 2)
    return f(std::integral_constant<int, 2>());
  else
    return vectors == 2 ? f(std::integral_constant<int, 2>()) : f(std::integral_constant<int, 3>());
}

// How a call sums along k. Rounding errors grow with the length of a chain of additions; a chain
// over a long k also has to leave its part of B in the first-level cache. Few rows are cheap beside
// the packing of the weights, so that there sums are as short as those of a dot product.
struct Chains {
  bool few;        // rows are multiplied one at a time
  int64_t length;  // in words
  Chains(int64_t rows, int64_t block)
      : few(rows < block),
        length(rows < block ? 16 * block
               : rows <= 64 ? 64
                            : 256) {}
};

// C [m, n] += A [m, k] B [k, n] for a long k, cut into chains. A narrow B is folded. Writes whole
// blocks of rows.
template <class G>
inline void multiply_long(Chains chains, int64_t m, int64_t words, const typename G::Store* a,
                          int64_t lda, const float* b, Panels<G> n, float* c, int64_t ldc) {
  for (int64_t k = 0; k < words; k += chains.length)
    for (int64_t i = 0; i < m; i += G::kBlock)
      for (int64_t p = 0; p < n.count; ++p) {
        int64_t column = n.first(p) * kLanes, length = least(chains.length, words - k);
        const auto* block = a + i * lda + k * G::Unit::kPerWord;
        if constexpr (G::kFolds)
          if (n.narrow) {
            G::accumulate_folded(chains.few, m - i, length, block, lda, b + k / 2 * kLanes,
                                 c + i * ldc, ldc);
            continue;
          }
        with_vectors<G>(n.size(p), [&](auto vectors) {
          G::template accumulate<vectors>(chains.few, m - i, length, block, lda,
                                          b + words * column + k * vectors * kLanes,
                                          c + i * ldc + column, ldc);
        });
      }
}

// A [m, k] B [k, n] for a short k, block by block: epilogue(row, rows, column, columns, c) has one
// in c [rows, G::kPanel * kLanes]. prepare(row, column) comes before, for each row of a block.
template <class G, class Prepare, class Epilogue>
inline void multiply(Chains chains, int64_t m, int64_t words, const typename G::Store* a,
                     int64_t lda, const float* b, Panels<G> n, const Prepare& prepare,
                     const Epilogue& epilogue) {
  constexpr int64_t ldc = G::kPanel * kLanes;
  alignas(64) float c[G::kBlock * ldc];
  for (int64_t i = 0; i < m; i += G::kBlock)
    for (int64_t p = 0; p < n.count; ++p) {
      int64_t column = n.first(p) * kLanes, rows = least(m - i, G::kBlock);
      for (int64_t row = i; row < i + rows; ++row) prepare(row, column);
      with_vectors<G>(n.size(p), [&](auto vectors) {
        G::template product<vectors>(chains.few, rows, words, a + i * lda, lda, b + words * column,
                                     c, ldc);
      });
      epilogue(i, rows, column, n.size(p) * kLanes, c);
    }
}

}  // namespace
}  // namespace fastadapters::cpu

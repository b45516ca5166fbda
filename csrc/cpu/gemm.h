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
  static constexpr bool kFolds = true, kPacksOnTheWay = true;

  struct Session {};

  // c = the product of a block. A step along k is a word, or two words for folded columns. Rows of
  // A may lie at any address. B is packed or gives the vectors of a step: (k, where they belong).
  template <int vectors, class Step = int32_t, class B>
  static FASTADAPTERS_INLINE void run(int64_t steps, const Store* a, int64_t lda, const B& b,
                                      Vec (&c)[kRows][vectors]) {
    const char* row[kRows];
    for (int i = 0; i < kRows; ++i, a += lda) row[i] = (const char*)a;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) c[i][j] = Vec{};
    for (int64_t k = 0; k < steps; ++k) {
      Vec bk[vectors];
      if constexpr (std::is_convertible_v<B, const float*>) {
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) bk[j] = read<Vec>(b + (k * vectors + j) * kLanes);
      } else {
        b(k, bk);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        Vec aik = splat<Step>(row[i] + k * sizeof(Step));
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) c[i][j] = Unit::multiply_add(aik, bk[j], c[i][j]);
      }
    }
  }

  // finish() gives what takes each of the first `rows` rows of the product: (i, its vectors). It
  // comes behind the sums, since what it keeps in registers would displace them.
  template <int vectors, class Finish>
  static FASTADAPTERS_INLINE void product(int64_t rows, int64_t words, const Store* a, int64_t lda,
                                          const float* b, const Finish& finish) {
    Vec sum[kRows][vectors];
    run<vectors>(words, a, lda, b, sum);
    auto row = finish();
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
      if (i < rows) row(i, sum[i]);
  }

  // C [kBlock, vectors * kLanes] += the product, summed apart first: over many calls the rounding
  // errors grow with their number, not with the number of terms.
  template <int vectors, class B>
  static FASTADAPTERS_INLINE void accumulate(int64_t, int64_t words, const Store* a, int64_t lda,
                                             const B& b, float* c, int64_t ldc) {
    Vec sum[kRows][vectors];
    run<vectors>(words, a, lda, b, sum);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) {
        float* to = c + i * ldc + j * kLanes;
        store(to, read<Vec>(to) + sum[i][j]);
      }
  }

  // The same for a folded panel.
  static inline void accumulate_folded(int64_t words, const Store* a, int64_t lda, const float* b,
                                       float* c, int64_t ldc) {
    Vec sum[kRows][1];
    run<1, int64_t>(words / 2, a, lda, b, sum);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      float* to = c + i * ldc;
      store(to, read<Vec>(to) + add_neighbours(sum[i][0], std::make_index_sequence<kLanes>()));
    }
  }
};

// N columns, in vectors, split into panels of at most so many, as equal as possible. A packed
// operand or an array of accumulators with n rows keeps panel p at offset n * kLanes * first(p).
template <int most>
struct Panels {
  int64_t vectors, count;
  bool narrow;

  explicit Panels(int64_t columns)
      : vectors(divide_up(columns, kLanes)),
        count(divide_up(vectors, most)),
        narrow(2 * columns <= kLanes) {}
  int64_t first(int64_t p) const { return vectors * p / count; }
  int64_t size(int64_t p) const { return first(p + 1) - first(p); }
  int64_t columns() const { return vectors * kLanes; }
};

// Folds a narrow B, packed as usual, in place: two words of k side by side for each column, where
// half of the lanes would be idle.
template <class G>
inline void fold(Panels<G::kPanel> n, int64_t words, float* b) {
  if (!G::kFolds || !n.narrow) return;
  for (int64_t k = 0; k < words; k += 2)
    store(b + k / 2 * kLanes,
          interleave_low(read<Vec>(b + k * kLanes), read<Vec>(b + (k + 1) * kLanes),
                         std::make_index_sequence<kLanes>()));
}

// C [m, n] += A [m, k] B [k, n] for a long k, cut into chains of so many words: rounding errors
// grow with the length of a chain of additions, which also has to leave its part of B in the
// first-level cache. A narrow B is folded. Writes whole blocks of rows.
template <class G>
inline void multiply_long(int64_t chain, int64_t m, int64_t words, const typename G::Store* a,
                          int64_t lda, const float* b, Panels<G::kPanel> n, float* c, int64_t ldc) {
  for (int64_t k = 0; k < words; k += chain)
    for (int64_t i = 0; i < m; i += G::kBlock)
      for (int64_t p = 0; p < n.count; ++p) {
        int64_t column = n.first(p) * kLanes, length = least(chain, words - k);
        const auto* block = a + i * lda + k * G::Unit::kPerWord;
        if constexpr (G::kFolds)
          if (n.narrow) {
            G::accumulate_folded(length, block, lda, b + k / 2 * kLanes, c + i * ldc, ldc);
            continue;
          }
        with_constant<G::kPanel>(n.size(p), [&](auto vectors) {
          G::template accumulate<vectors>(m - i, length, block, lda,
                                          b + words * column + k * vectors * kLanes,
                                          c + i * ldc + column, ldc);
        });
      }
}

// A [m, k] B [k, n] for a short k, block by block. finish(vectors, row, column) gives what takes
// the rows of a block: (i, their vectors). prepare(row, rows, column) comes before.
template <class G, class Prepare, class Finish>
inline void multiply(int64_t m, int64_t words, const typename G::Store* a, int64_t lda,
                     const float* b, Panels<G::kPanel> n, const Prepare& prepare,
                     const Finish& finish) {
  for (int64_t i = 0; i < m; i += G::kBlock)
    for (int64_t p = 0; p < n.count; ++p) {
      int64_t column = n.first(p) * kLanes, rows = least(m - i, G::kBlock);
      prepare(i, rows, column);
      with_constant<G::kPanel>(n.size(p), [&](auto vectors) {
        G::template product<vectors>(
            rows, words, a + i * lda, lda, b + words * column,
            [&]() FASTADAPTERS_INLINED { return finish(vectors, i, column); });
      });
    }
}

// The same of a product in memory.
template <class Finish>
inline void finish_stored(int64_t m, const float* c, int64_t ldc, int64_t columns,
                          const Finish& finish) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    auto row = finish(std::integral_constant<int, 1>(), 0, j);
    for (int64_t i = 0; i < m; ++i) {
      Vec v[1] = {read<Vec>(c + i * ldc + j)};
      row(i, v);
    }
  }
}

}  // namespace
}  // namespace fastadapters::cpu

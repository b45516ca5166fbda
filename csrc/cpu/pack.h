// Bringing operands into the layouts of gemm.h.
#pragma once

#include "gemm.h"

namespace fastadapters::cpu {
namespace {

// A parameter [rows, columns] rounded to the compute dtype T, then times the optional scales. What
// lies outside reads as 0.
template <class T>
struct Weight {
  Parameter data;
  int64_t rows, columns;
  const float* row_scale = nullptr;
  const float* column_scale = nullptr;  // padded to whole vectors

  template <class Stored>
  static Vec rounded(Vec v) {
    return std::is_same_v<Stored, T> ? v : round_to<T>(v);
  }
  // Of `p`, the data by its type.
  template <class Stored>
  FASTADAPTERS_INLINE Vec at(const Stored* p, int64_t row, int64_t column) const {
    if (row >= rows || column >= columns) return Vec{};
    Vec v = rounded<Stored>(load(p + row * columns + column, columns - column));
    if (row_scale) v *= row_scale[row];
    if (column_scale) v *= read<Vec>(column_scale + column);
    return v;
  }
  Vec operator()(int64_t row, int64_t column) const {
    return with_type(data, [&](auto* p) { return at(p, row, column); });
  }
};

// Panel p of B = W: k runs down the rows of W.
template <class G, class T>
inline void pack_rows(const Weight<T>& w, Panels<G::kPanel> n, int64_t p, int64_t words, float* b) {
  int64_t first = n.first(p), vectors = n.size(p);
  float* panel = b + words * first * kLanes;
  with_type(w.data, [&](auto* data) {
    for (int64_t k = 0; k < words; ++k)
      for (int64_t j = 0; j < vectors; ++j) {
        auto row_at = [&](int64_t row) { return w.at(data, row, (first + j) * kLanes); };
        store(panel + (k * vectors + j) * kLanes, G::Unit::across_rows(k, row_at));
      }
  });
}

// Panel p of B = W^T: k runs along the rows of W.
template <class G, class T>
inline void pack_columns(const Weight<T>& w, Panels<G::kPanel> n, int64_t p, int64_t words,
                         float* b) {
  int64_t first = n.first(p), vectors = n.size(p);
  float* panel = b + words * first * kLanes;
  with_type(w.data, [&](auto* data) {
    for (int64_t j = 0; j < vectors; ++j)
      for (int64_t k = 0; k < words; k += kLanes) {
        Vec block[kLanes];
        for (int64_t row = 0; row < kLanes; ++row)
          block[row] = G::Unit::along_row(
              k, [&](int64_t column) { return w.at(data, (first + j) * kLanes + row, column); });
        transpose(block);
        for (int64_t i = 0; i < least(kLanes, words - k); ++i)
          store(panel + ((k + i) * vectors + j) * kLanes, block[i]);
      }
  });
}

// A = T^T as words along m, from a tile t [m, n] of fp32 rows (n a multiple of kLanes). Rows of A
// are `words` long, a multiple of kLanes; what lies beyond m is 0.
template <class G>
inline void pack_transposed(const float* t, int64_t m, int64_t n, float* a, int64_t words) {
  for (int64_t j = 0; j < n; j += kLanes)
    for (int64_t k = 0; k < words; k += kLanes) {
      Vec block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        block[i] = G::Unit::across_rows(
            k + i, [&](int64_t row) { return row < m ? read<Vec>(t + row * n + j) : Vec{}; });
      transpose(block);
      for (int64_t i = 0; i < kLanes; ++i) store(a + (j + i) * words + k, block[i]);
    }
}

// One panel of B = X, a tile of m rows and d columns, from column `first` on; rows beyond m are 0.
template <class G, int vectors>
inline void pack_tile(const typename G::Store* x, int64_t ld, int64_t m, int64_t d, int64_t first,
                      int64_t words, float* b) {
  constexpr int per_word = G::Unit::kPerWord;
  int64_t filled = divide_up(m, per_word);
  for (int64_t k = 0; k < filled; ++k) {
    const auto* row = x + k * per_word * ld + first;
    const auto* next = k * per_word + 1 < m ? row + ld : nullptr;
    for (int j = 0; j < vectors; ++j)
      store(b + (k * vectors + j) * kLanes,
            G::Unit::interleave(row + j * kLanes, next ? next + j * kLanes : nullptr,
                                d - first - j * kLanes));
  }
  std::memset(b + filled * vectors * kLanes, 0, (words - filled) * vectors * sizeof(Vec));
}

// The same of whole words and vectors, by the product that first needs them: it hides the way from
// the second-level cache.
template <class G, int vectors>
struct PackOnTheWay {
  const typename G::Store* x;
  int64_t ld;
  float* b;
  FASTADAPTERS_INLINE void operator()(int64_t k, Vec (&bk)[vectors]) const {
    const auto* row = x + k * G::Unit::kPerWord * ld;
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) {
      bk[j] = G::Unit::interleave(row + j * kLanes, row + ld + j * kLanes);
      store(b + (k * vectors + j) * kLanes, bk[j]);
    }
  }
};

// Adds each column's sum of a packed panel, of short chains of additions.
template <class G, int vectors>
inline void add_columns(const float* b, int64_t words, double* sums) {
  constexpr int64_t chain = 8;
  Vec total[vectors] = {};
  for (int64_t begin = 0; begin < words; begin += chain) {
    Vec part[vectors] = {};
    for (int64_t k = begin; k < least(begin + chain, words); ++k)
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j)
        part[j] = G::Unit::multiply_add(G::Unit::one(), read<Vec>(b + (k * vectors + j) * kLanes),
                                        part[j]);
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) total[j] += part[j];
  }
  for (int j = 0; j < vectors; ++j)
    for (int lane = 0; lane < kLanes; ++lane) sums[j * kLanes + lane] += total[j][lane];
}

}  // namespace
}  // namespace fastadapters::cpu

// Products of a few rows with a weight where it is stored: packing it would take longer.
#pragma once

#include "pack.h"

namespace fastadapters::cpu {
namespace {

constexpr int64_t kFewRows = 16;
constexpr int64_t kFewSteps = 16;  // a chain of additions, of vectors
constexpr int kFewVectors = 8;     // of a result, in registers

inline float value(const float* p) { return *p; }
inline float value(const bfloat16* p) { return load(p, 1)[0]; }

// out [vectors * kLanes] = the sum of the rows of X, each times its factor. Of one vector n columns
// exist.
template <int vectors, class T, class X>
FASTADAPTERS_INLINE void sum_panel(int64_t rows, const float* factors, const X* x, int64_t ldx,
                                   int64_t n, float* out, bool add) {
  Vec sum[vectors] = {};
  for (int64_t k = 0; k < rows; ++k, x += ldx) {
    Vec factor = broadcast(factors[k]);
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) {
      Vec v = vectors == 1 ? load(x, n) : load(x + j * kLanes);
      sum[j] += factor * Weight<T>::template rounded<X>(v);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < vectors; ++j, out += kLanes)
    store(out, add ? sum[j] + read<Vec>(out) : sum[j]);
}

// out = the sum of the rows of X [rows, n], each times its factor, or that added to it. Whole
// vectors of out are written.
template <class T, class X>
inline void sum_rows(int64_t rows, const float* factors, const X* x, int64_t ldx, int64_t n,
                     float* out, bool add = false) {
  int64_t j = 0;
  auto panels = [&](auto vectors) {
    constexpr int64_t width = vectors * kLanes;
    for (; j + width <= n; j += width)
      sum_panel<vectors, T>(rows, factors, x + j, ldx, width, out + j, add);
  };
  panels(std::integral_constant<int, kFewVectors>());
  panels(std::integral_constant<int, 2>());
  panels(std::integral_constant<int, 1>());
  if (j < n) sum_panel<1, T>(rows, factors, x + j, ldx, n - j, out + j, add);
}

template <class T>
struct RoundedTo {
  using Type = T;
};

// Calls f(rows, their distance, what they are still to be rounded to) for a block of W from element
// (k, j) on: where it is if one row of A reads it, else copied, since at some distances the rows of
// W share a few sets of the caches.
template <class T, class Stored, class F>
FASTADAPTERS_INLINE void with_panel(int64_t m, const Weight<T>& w, const Stored* data, int64_t k,
                                    int64_t j, int64_t rows, int64_t width, float* panel,
                                    const F& f) {
  data += k * w.columns + j;
  if (m == 1) return f(data, w.columns, RoundedTo<T>());
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t v = 0; v < width; v += kLanes)
      store(panel + row * width + v, Weight<T>::template rounded<Stored>(
                                         load(data + row * w.columns + v, w.columns - j - v)));
  f((const float*)panel, width, RoundedTo<float>());
}

// C [m, n] = A [m, k] W for W [k, n]. Whole vectors of C are written.
template <class T, class A>
__attribute__((noinline)) void multiply_stored(int64_t m, const A* a, int64_t lda,
                                               const Weight<T>& w, float* c, int64_t ldc) {
  constexpr int64_t width = kFewVectors * kLanes;
  alignas(64) float panel[kFewSteps * width];
  with_type(w.data, [&](auto* data) {
    for (int64_t j = 0; j < w.columns; j += width)
      for (int64_t k = 0; k < w.rows; k += kFewSteps) {
        int64_t steps = least(kFewSteps, w.rows - k), n = least(width, w.columns - j);
        auto multiply_block = [&](auto* rows, int64_t ld, auto rounded) {
          for (int64_t i = 0; i < m; ++i) {
            float factors[kFewSteps];
            for (int64_t s = 0; s < steps; ++s)
              factors[s] = value(a + i * lda + k + s) * (w.row_scale ? w.row_scale[k + s] : 1);
            sum_rows<typename decltype(rounded)::Type>(steps, factors, rows, ld, n, c + i * ldc + j,
                                                       k > 0);
          }
        };
        with_panel(m, w, data, k, j, steps, round_up(n, kLanes), panel, multiply_block);
      }
  });
  for (int64_t i = 0; w.column_scale && i < m; ++i)
    for (int64_t j = 0; j < w.columns; j += kLanes)
      store(c + i * ldc + j, read<Vec>(c + i * ldc + j) * read<Vec>(w.column_scale + j));
}

// kLanes dot products along up to `columns` of k, of which element l is added to total[l]; rows of
// W from `rows` on repeat the last one.
template <class T, class A, class Stored>
FASTADAPTERS_INLINE void add_dots(const A* a, const Stored* w, int64_t ldw, int64_t rows,
                                  int64_t columns, Vec (&total)[kLanes]) {
  const Stored* row[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) row[l] = w + least(l, rows - 1) * ldw;
  Vec part[kLanes] = {};
  auto step = [&](int64_t k, auto left) FASTADAPTERS_INLINED {
    Vec ak = load(a + k, left);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l)
      part[l] += ak * Weight<T>::template rounded<Stored>(load(row[l] + k, left));
  };
  int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) step(k, std::integral_constant<int64_t, kLanes>());
  if (k < columns) step(k, columns - k);
#pragma GCC unroll 16
  for (int l = 0; l < kLanes; ++l) total[l] += part[l];
}

// C [m, n] = A [m, k] W^T for W [n, k], without scales, kLanes rows of W at a time. Whole vectors
// of C are written.
template <class T, class A>
__attribute__((noinline)) void multiply_stored_transposed(int64_t m, const A* a, int64_t lda,
                                                          const Weight<T>& w, float* c,
                                                          int64_t ldc) {
  constexpr int64_t width = kFewSteps * kLanes;
  alignas(64) float panel[kLanes * width];
  with_type(w.data, [&](auto* data) {
    for (int64_t j = 0; j < w.rows; j += kLanes) {
      int64_t rows = least(kLanes, w.rows - j);
      if (w.columns <= kLanes) {
        Vec column[kLanes];
        for (int64_t l = 0; l < kLanes; ++l) column[l] = w.at(data, j + l, 0);
        transpose(column);
        for (int64_t i = 0; i < m; ++i) {
          Vec sum = {};
          for (int64_t k = 0; k < w.columns; ++k) sum += value(a + i * lda + k) * column[k];
          store(c + i * ldc + j, sum);
        }
        continue;
      }
      Vec total[kFewRows][kLanes];
      std::memset(total, 0, m * sizeof(total[0]));
      for (int64_t k = 0; k < w.columns; k += width) {
        int64_t n = least(width, w.columns - k);
        auto add_block = [&](auto* block, int64_t ld, auto rounded) {
          for (int64_t i = 0; i < m; ++i)
            add_dots<typename decltype(rounded)::Type>(a + i * lda + k, block, ld, rows, n,
                                                       total[i]);
        };
        with_panel(m, w, data, j, k, rows, round_up(n, kLanes), panel, add_block);
      }
      for (int64_t i = 0; i < m; ++i) {
        transpose(total[i]);
        for (int half = kLanes / 2; half > 0; half /= 2)
          for (int l = 0; l < half; ++l) total[i][l] += total[i][l + half];
        store(c + i * ldc + j, total[i][0]);
      }
    }
  });
}

}  // namespace
}  // namespace fastadapters::cpu

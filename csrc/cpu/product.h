// Products of small fp32 matrices wherever they lie: C [m, n] = A [m, k] B [k, n].
#pragma once

#include "gemm.h"
#include "scratch.h"

namespace fastadapters::cpu {
namespace {

// Element (i, j) is at i * row + j * column.
struct View {
  const float* data;
  int64_t row, column;

  View transposed() const { return {data, column, row}; }
  View from(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
};

inline View rows_of(const float* data, int64_t ld) { return {data, ld, 1}; }
inline View columns_of(const float* data, int64_t ld) { return {data, 1, ld}; }

struct PanelOfB {
  static constexpr int kPanel = 4;
};
using Panels_ = Panels<PanelOfB>;
constexpr int kPanelVectors = PanelOfB::kPanel;
constexpr int64_t kPanelColumns = kPanelVectors * kLanes;
constexpr int64_t kChain = 32;   // longest chain of additions
constexpr int64_t kDepth = 128;  // of k, what a panel holds: it stays in the first-level cache

// Rows of a block of C: as many as leave registers for what is multiplied.
template <int vectors>
constexpr int kBlockRows = vectors == 1 ? 8 : (kLanes == 16 ? 24 : 12) / vectors;

// c += the product of so many rows of A, of which those from `rows` on repeat the last one, and
// rows of B that are `ldb` apart.
template <int vectors, int block>
FASTADAPTERS_INLINE void add_product(int64_t rows, int64_t k, View a, const float* b, int64_t ldb,
                                     Vec (&c)[block][vectors]) {
  const float* row[block];
  for (int i = 0; i < block; ++i) row[i] = a.data + least(i, rows - 1) * a.row;
  for (int64_t step = 0; step < k; ++step, b += ldb) {
    int64_t at = step * a.column;
    if constexpr (block < vectors) {  // the fewer operands stay in registers
      Vec ak[block];
#pragma GCC unroll 8
      for (int i = 0; i < block; ++i) ak[i] = broadcast(row[i][at]);
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) {
        Vec bkj = read<Vec>(b + j * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < block; ++i) c[i][j] = ak[i] * bkj + c[i][j];
      }
    } else {
      Vec bk[vectors];
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) bk[j] = read<Vec>(b + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < block; ++i) {
        Vec aik = broadcast(row[i][at]);
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) c[i][j] = aik * bk[j] + c[i][j];
      }
    }
  }
}

// A block of C, of which `rows` rows and n columns exist. Where C is not added to it is the product
// and a row `bias`, if there is one. What a chain has summed goes to C before the next one runs.
template <int vectors>
__attribute__((noinline)) void product_block(int64_t rows, int64_t n, int64_t k, View a,
                                             const float* b, int64_t ldb, float* c, int64_t ldc,
                                             bool add, const float* bias) {
  constexpr int block = kBlockRows<vectors>;
  for (int64_t step = 0; step == 0 || step < k; step += kChain) {
    Vec sum[block][vectors] = {};
    add_product(rows, least(kChain, k - step), a.from(0, step), b + step * ldb, ldb, sum);
    auto finish = [&](auto left) FASTADAPTERS_INLINED {
#pragma GCC unroll 16
      for (int i = 0; i < block; ++i) {
        if (i >= rows) break;
        float* to = c + i * ldc;
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) {
          Vec v = sum[i][j];
          if (add || step)
            v += load(to + j * kLanes, left(j));
          else if (bias)
            v += load(bias + j * kLanes, left(j));
          store(to + j * kLanes, v, left(j));
        }
      }
    };
    if (n >= vectors * kLanes)
      finish([](int) { return int64_t(kLanes); });
    else
      finish([n](int j) { return n - j * kLanes; });
  }
}

template <int vectors, class F>
FASTADAPTERS_INLINE void with_panel(int64_t n, const F& f) {
  if constexpr (vectors > 1)
    if (n < vectors) return with_panel<vectors - 1>(n, f);
  f(std::integral_constant<int, vectors>());
}

// C = A B, or C += A B, for a panel of B with `ldb` from row to row.
__attribute__((noinline)) inline void multiply_panel(int64_t vectors, int64_t m, int64_t n,
                                                     int64_t k, View a, const float* b, int64_t ldb,
                                                     float* c, int64_t ldc, bool add,
                                                     const float* bias = nullptr) {
  with_panel<kPanelVectors>(vectors, [&](auto vectors) {
    constexpr int block = kBlockRows<vectors>;
    for (int64_t i = 0; i < m; i += block)
      product_block<vectors>(least(block, m - i), n, k, a.from(i, 0), b, ldb, c + i * ldc, ldc, add,
                             bias);
  });
}

// A panel of B: [k, vectors * kLanes], 0 from column n on.
__attribute__((noinline)) inline void pack_panel(View b, int64_t k, int64_t n, int64_t vectors,
                                                 float* out) {
  if (b.column == 1) {
    for (int64_t row = 0; row < k; ++row)
      for (int64_t j = 0; j < vectors; ++j, out += kLanes)
        store(out, load(b.data + row * b.row + j * kLanes, n - j * kLanes));
    return;
  }
  for (int64_t j = 0; j < vectors; ++j)
    for (int64_t row = 0; row < k; row += kLanes) {
      Vec block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        int64_t column = j * kLanes + i;
        block[i] = column < n ? load(b.data + column * b.column + row, k - row) : Vec{};
      }
      transpose(block);
      for (int64_t i = 0; i < least(kLanes, k - row); ++i)
        store(out + ((row + i) * vectors + j) * kLanes, block[i]);
    }
}

// All of B, panel p at k * kLanes * first(p).
__attribute__((noinline)) inline void pack(View b, int64_t k, int64_t n, float* out) {
  Panels_ panels(n);
  for (int64_t p = 0; p < panels.count; ++p) {
    int64_t column = panels.first(p) * kLanes;
    pack_panel(b.from(0, column), k, n - column, panels.size(p), out + k * column);
  }
}
inline int64_t packed_size(int64_t k, int64_t n) { return k * round_up(n, kLanes); }

// C = A B + bias, or C += A B, with B packed.
__attribute__((noinline)) inline void multiply_packed(int64_t m, int64_t n, int64_t k, View a,
                                                      const float* b, float* c, int64_t ldc,
                                                      bool add, const float* bias = nullptr) {
  Panels_ panels(n);
  for (int64_t p = 0; p < panels.count; ++p) {
    int64_t column = panels.first(p) * kLanes, ldb = panels.size(p) * kLanes;
    for (int64_t step = 0; step < k; step += kDepth)
      multiply_panel(panels.size(p), m, n - column, least(kDepth, k - step), a.from(0, step),
                     b + k * column + step * ldb, ldb, c + column, ldc, add || step > 0,
                     bias ? bias + column : nullptr);
  }
}

// The same for any B. Each element of C is computed by one task, in one order.
__attribute__((noinline)) inline void multiply(const Threads& threads, int64_t m, int64_t n,
                                               int64_t k, View a, View b, float* c, int64_t ldc,
                                               bool add = false, const float* bias = nullptr) {
  Panels_ panels(n);
  constexpr int block = kBlockRows<kPanelVectors>;
  int64_t blocks = divide_up(m, block);
  int64_t tasks = greatest(1, least(threads.count, m * n * k >> 18));
  bool by_rows = blocks >= 4 * tasks;
  if (!by_rows) tasks = least(tasks, panels.count);
  parallel(threads, tasks, [&](int64_t t) {
    int64_t begin = by_rows ? blocks * t / tasks * block : 0;
    int64_t rows = (by_rows ? least(m, blocks * (t + 1) / tasks * block) : m) - begin;
    int64_t last = by_rows ? panels.count : panels.count * (t + 1) / tasks;
    alignas(64) float panel[kDepth * kPanelColumns];
    for (int64_t p = by_rows ? 0 : panels.count * t / tasks; p < last; ++p) {
      int64_t column = panels.first(p) * kLanes, vectors = panels.size(p);
      float* block = c + begin * ldc + column;
      for (int64_t step = 0; step == 0 || step < k; step += kDepth) {
        int64_t steps = least(kDepth, k - step);
        pack_panel(b.from(step, column), steps, n - column, vectors, panel);
        multiply_panel(vectors, rows, n - column, steps, a.from(begin, step), panel,
                       vectors * kLanes, block, ldc, add || step > 0,
                       bias ? bias + column : nullptr);
      }
    }
  });
}

// The sum of each column of m rows, added to `sums`: in levels, as rounding errors grow with the
// length of a chain.
__attribute__((noinline)) inline void add_column_sums(int64_t m, int64_t n, const float* rows,
                                                      int64_t ld, float* sums) {
  constexpr int64_t chain = 32;
  for (int64_t j = 0; j < n; j += kLanes) {
    Vec total = {}, middle = {};
    for (int64_t begin = 0; begin < m; begin += chain) {
      Vec part = {};
      for (int64_t i = begin; i < least(begin + chain, m); ++i)
        part += load(rows + i * ld + j, n - j);
      middle += part;
      if (begin / chain % chain == chain - 1) {
        total += middle;
        middle = Vec{};
      }
    }
    store(sums + j, load(sums + j, n - j) + (total + middle), n - j);
  }
}

// sum(f(j)) over n columns by vectors, as four chains of additions; f gives 0 beyond n.
template <class F>
FASTADAPTERS_INLINE float sum_of_columns(int64_t n, const F& f) {
  Vec part[4] = {};
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) part[i] += f(j + i * kLanes, kLanes);
  for (; j < n; j += kLanes) part[0] += f(j, n - j);
  return sum((part[0] + part[1]) + (part[2] + part[3]));
}

inline float dot(const float* a, const float* b, int64_t n) {
  return sum_of_columns(
      n, [=](int64_t j, int64_t left) { return load(a + j, left) * load(b + j, left); });
}
inline float sum(const float* a, int64_t n) {
  return sum_of_columns(n, [=](int64_t j, int64_t left) { return load(a + j, left); });
}

}  // namespace
}  // namespace fastadapters::cpu

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

constexpr int kPanelVectors = 4;
constexpr int64_t kPanelColumns = kPanelVectors * kLanes;
constexpr int64_t kChain = 32;   // of additions; the last one may be longer by an eighth
constexpr int64_t kDepth = 128;  // of k, what a panel holds: it stays in the first-level cache
constexpr int64_t kPart = 2048;  // of k, what is summed before it joins the sum of other parts

// With more rows of A than these B is packed even if it could be read in place: its rows may share
// a few sets of the first-level cache, and the second one gives narrower vectors fewer bytes than
// their FMAs ask for.
constexpr int64_t kRowsInPlace = kLanes == 16 ? INT64_MAX : 40;

// Rows of a block of C: as many as leave registers for what is multiplied.
constexpr int kBlockVectors = kLanes == 16 ? 24 : 12;
constexpr int block_rows(int64_t vectors) {
  return vectors == 1 ? 8 : int(kBlockVectors / vectors);
}

// c += the product of as many rows of A and of rows of B that are `ldb` apart. One pointer walks
// down the rows of A, where one for each would have them in memory.
template <int vectors, int block>
FASTADAPTERS_INLINE void add_product(int64_t k, View a, const float* b, int64_t ldb,
                                     Vec (&c)[block][vectors]) {
  for (; k > 0; --k, a.data += a.column, b += ldb) {
    const float* at = a.data;
    if constexpr (block < vectors) {  // the fewer operands stay in registers
      Vec ak[block];
#pragma GCC unroll 8
      for (int i = 0; i < block; ++i, at += a.row) ak[i] = broadcast(*at);
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
      for (int i = 0; i < block; ++i, at += a.row) {
        Vec aik = broadcast(*at);
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) c[i][j] = aik * bk[j] + c[i][j];
      }
    }
  }
}

// Blocks of C, one below the other: the product and the row `from`, or where `ld_from` is not 0 the
// rows so far apart, which may be C itself. What a chain has summed goes to C before the next one
// runs. A call for each block would cost a tenth where k is one chain.
template <int vectors, int block>
__attribute__((noinline)) void product_blocks(int64_t blocks, int64_t k, View a, const float* b,
                                              int64_t ldb, const float* from, int64_t ld_from,
                                              float* c, int64_t ldc) {
  for (; blocks > 0; --blocks) {
    const float* before = from;
    int64_t ld_before = ld_from;
    int64_t step = 0;
    do {
      int64_t steps = k - step > kChain + kChain / 8 ? kChain : k - step;
      Vec sum[block][vectors] = {};
      add_product(steps, a.from(0, step), b + step * ldb, ldb, sum);
      float* to = c;
#pragma GCC unroll 16
      for (int i = 0; i < block; ++i, before += ld_before, to += ldc)
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j)
          store(to + j * kLanes, read<Vec>(before + j * kLanes) + sum[i][j]);
      before = c;
      ld_before = ldc;
      step += steps;
    } while (step < k);
    a = a.from(block, 0);
    from += block * ld_from;
    c += block * ldc;
  }
}

using Product = decltype(product_blocks<1, 1>);

// The same where C has only n columns. Of a block `height` rows of `ld` columns are multiplied.
__attribute__((noinline)) inline void product_edges(Product* product, int64_t height, int64_t ld,
                                                    int64_t blocks, int64_t n, int64_t k, View a,
                                                    const float* b, int64_t ldb, const float* from,
                                                    int64_t ld_from, float* c, int64_t ldc) {
  alignas(64) float tile[kBlockVectors * kLanes];
  for (; blocks > 0; --blocks) {
    for (int64_t i = 0; i < height; ++i, from += ld_from)
      for (int64_t j = 0; j < ld; j += kLanes) store(tile + i * ld + j, load(from + j, n - j));
    product(1, k, a, b, ldb, tile, ld, tile, ld);
    for (int64_t i = 0; i < height; ++i, c += ldc)
      for (int64_t j = 0; j < ld; j += kLanes) store(c + j, read<Vec>(tile + i * ld + j), n - j);
    a = a.from(height, 0);
  }
}

// C = A B + bias, or C += A B, for a panel of B with `ldb` from row to row. Blocks of C are as tall
// as there are registers for, or less, all of one height or a row less.
__attribute__((noinline)) inline void multiply_panel(int64_t vectors, int64_t m, int64_t n,
                                                     int64_t k, View a, const float* b, int64_t ldb,
                                                     float* c, int64_t ldc, bool add,
                                                     const float* bias = nullptr) {
  static constexpr float zeros[kPanelColumns] = {};
  const float* from = add ? c : bias ? bias : zeros;
  int64_t ld_from = add ? ldc : 0, ld = vectors * kLanes;
  auto run = [&](int64_t height, int64_t blocks) {
    Product* product = nullptr;
    with_constant<kPanelVectors>(vectors, [&](auto vectors) {
      with_constant<block_rows(vectors)>(
          height, [&](auto height) { product = product_blocks<vectors, height>; });
    });
    if (n >= ld)
      product(blocks, k, a, b, ldb, from, ld_from, c, ldc);
    else
      product_edges(product, height, ld, blocks, n, k, a, b, ldb, from, ld_from, c, ldc);
    a = a.from(height * blocks, 0);
    from += height * blocks * ld_from;
    c += height * blocks * ldc;
  };
  int64_t blocks = divide_up(m, block_rows(vectors)), height = divide_up(m, greatest(1, blocks));
  int64_t low = blocks * height - m;  // so many are a row less
  if (low > 0) run(height - 1, low);
  if (low < blocks) run(height, blocks - low);
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
  Panels<kPanelVectors> panels(n);
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
  Panels<kPanelVectors> panels(n);
  for (int64_t p = 0; p < panels.count; ++p) {
    int64_t column = panels.first(p) * kLanes, ldb = panels.size(p) * kLanes;
    for (int64_t step = 0; step < k; step += kDepth)
      multiply_panel(panels.size(p), m, n - column, least(kDepth, k - step), a.from(0, step),
                     b + k * column + step * ldb, ldb, c + column, ldc, add || step > 0,
                     bias ? bias + column : nullptr);
  }
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

// sum(f(j)) over n columns by vectors, as four chains of additions for each part; f gives 0 beyond
// n.
template <class F>
FASTADAPTERS_INLINE float sum_of_columns(int64_t n, const F& f) {
  float total = 0;
  for (int64_t j = 0, end; j < n; j = end) {
    end = least(n, j + kPart);
    Vec part[4] = {};
    for (; j + 4 * kLanes <= end; j += 4 * kLanes)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) part[i] += f(j + i * kLanes, kLanes);
    for (; j < end; j += kLanes) part[0] += f(j, n - j);
    total += sum((part[0] + part[1]) + (part[2] + part[3]));
  }
  return total;
}

inline float dot(const float* a, const float* b, int64_t n) {
  return sum_of_columns(
      n, [=](int64_t j, int64_t left) { return load(a + j, left) * load(b + j, left); });
}
inline float sum(const float* a, int64_t n) {
  return sum_of_columns(n, [=](int64_t j, int64_t left) { return load(a + j, left); });
}

// C = A b + bias, or C += A b, for a column of B and of C.
__attribute__((noinline)) inline void multiply_column(int64_t m, int64_t k, View a, View b,
                                                      float* c, int64_t ldc, bool add,
                                                      const float* bias) {
  for (int64_t i = 0; !add && i < m; ++i) c[i * ldc] = bias ? *bias : 0;
  constexpr int64_t depth = 512;
  float column[depth];
  for (int64_t step = 0; step < k; step += depth, a = a.from(0, depth)) {
    int64_t steps = least(depth, k - step);
    for (int64_t i = 0; i < steps; ++i) column[i] = b.data[(step + i) * b.row];
    if (a.column == 1) {
      for (int64_t i = 0; i < m; ++i) c[i * ldc] += dot(a.data + i * a.row, column, steps);
      continue;
    }
    constexpr int64_t block = 4 * kLanes;
    for (int64_t i = 0; i < m; i += block) {
      alignas(64) float total[block] = {};
      for (int64_t begin = 0; begin < steps; begin += kChain) {
        Vec part[4] = {};
        for (int64_t j = begin; j < least(begin + kChain, steps); ++j)
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v)
            part[v] += load(a.data + j * a.column + i + v * kLanes, m - i - v * kLanes) * column[j];
        for (int v = 0; v < 4; ++v)
          store(total + v * kLanes, read<Vec>(total + v * kLanes) + part[v]);
      }
      for (int64_t j = 0; j < least(block, m - i); ++j) c[(i + j) * ldc] += total[j];
    }
  }
}

// The same for any B, which is read where it is if its rows are whole vectors, else packed, outside
// of tasks. Each element of C is computed by one task, in one order: a part of k after the other. A
// column that would have a vector for itself is multiplied apart.
__attribute__((noinline)) inline void multiply(const Threads& threads, int64_t m, int64_t n,
                                               int64_t k, View a, View b, float* c, int64_t ldc,
                                               bool add = false, const float* bias = nullptr) {
  if (k > kPart) {  // the first part's product, and the sum of the others in double
    auto* total = (double*)task_scratch().reserve(size_t(m * n) * (sizeof(double) + sizeof(float)));
    float* part = (float*)(total + m * n);
    std::memset(total, 0, size_t(m * n) * sizeof(double));
    multiply(threads, m, n, kPart, a, b, c, ldc, add, bias);
    for (int64_t step = kPart; step < k; step += kPart) {
      multiply(threads, m, n, least(kPart, k - step), a.from(0, step), b.from(step, 0), part, n);
      for (int64_t i = 0; i < m * n; ++i) total[i] += part[i];
    }
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) c[i * ldc + j] = float(c[i * ldc + j] + total[i * n + j]);
    return;
  }
  const int64_t single = n > kLanes && n % kLanes == 1;
  n -= single;
  Panels<kPanelVectors> panels(n);
  constexpr int block = block_rows(kPanelVectors);
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
        View of = b.from(step, column);
        const bool packed = of.column != 1 || n - column < vectors * kLanes || rows > kRowsInPlace;
        if (packed) pack_panel(of, steps, n - column, vectors, panel);
        multiply_panel(vectors, rows, n - column, steps, a.from(begin, step),
                       packed ? panel : of.data, packed ? vectors * kLanes : of.row, block, ldc,
                       add || step > 0, bias ? bias + column : nullptr);
      }
    }
    if (single && last == panels.count)
      multiply_column(rows, k, a.from(begin, 0), b.from(0, n), c + begin * ldc + n, ldc, add,
                      bias ? bias + n : nullptr);
  });
}

}  // namespace
}  // namespace fastadapters::cpu

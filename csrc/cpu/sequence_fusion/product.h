// Products of small matrices: a block of C stays in registers while k runs.
#pragma once

#include "../unit.h"

namespace fastadapters::cpu {
namespace {

// N columns as panels of kPanel vectors; the last two share what would leave a single one. A packed
// B [k, N] keeps panel p at offset k * kLanes * first(p).
struct Columns {
  static constexpr int kPanel = 3;
  int64_t vectors, count, shift;
  bool narrow;  // half of the lanes would be idle

  explicit Columns(int64_t columns)
      : vectors(divide_up(columns, kLanes)),
        count(divide_up(vectors, kPanel)),
        shift(vectors % kPanel == 1 && count > 1),
        narrow(2 * columns <= kLanes) {}
  int64_t first(int64_t p) const { return p * kPanel - (p == count - 1 ? shift : 0); }
  int64_t size(int64_t p) const { return (p == count - 1 ? vectors : first(p + 1)) - first(p); }
  int64_t columns() const { return vectors * kLanes; }
};

// Half a vector: AVX-512 multiplies and stores twice as many in a cycle, so that a narrow panel has
// no idle lanes.
typedef float Slim __attribute__((vector_size(2 * kLanes)));

// Calls f with a null pointer to what panel p is made of, and how many of these as a constant.
template <class F>
FASTADAPTERS_INLINE void with_panel(const Columns& n, int64_t p, const F& f) {
  if (kLanes == 16 && n.narrow) return f((Slim*)nullptr, std::integral_constant<int, 1>());
  with_constant<Columns::kPanel>(n.size(p), [&](auto vectors) { f((Vec*)nullptr, vectors); });
}

// A Step at any address in every lane of V, or in every pair of them.
template <class V, class Step>
FASTADAPTERS_INLINE V spread(const void* p) {
  if constexpr (std::is_same_v<V, Vec>)
    return splat<Step>((const char*)p);
  else
    return read<float>(p) - V{};
}

template <class Words, class V>
FASTADAPTERS_INLINE V multiply_add(V a, V b, V c) {
  if constexpr (std::is_same_v<V, Vec>)
    return Words::multiply_add(a, b, c);
  else
    return a * b + c;
}

template <class V>
FASTADAPTERS_INLINE void write(float* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

// Sums along k are made of chains of this many additions: rounding errors grow with their length.
constexpr int64_t kChain = 64;
// The definition takes the sums over r before those over tokens, ours after them: where they cancel
// the errors of the sums over tokens are what is left, so these have shorter chains.
constexpr int64_t kTokenChain = 8;

// Enough chains of additions at a time to hide the latency of one.
template <int vectors>
constexpr int kBlockRows = vectors == 1 || kLanes == 16 ? 8
                           : vectors == 2               ? 6
                                                        : 4;

// c[i][j] += the sum of a[i][k] * b[k * ldb + j] over k from `first` on, short of `end`. A Step is
// one of the Words, or two of them for a folded b.
template <class Words, class Step, class V, int rows, int vectors>
FASTADAPTERS_INLINE void add_products(int64_t first, int64_t end, const float* const (&a)[rows],
                                      const float* b, int64_t ldb, V (&c)[rows][vectors]) {
  b += first * ldb;
#pragma GCC unroll 4
  for (int64_t k = first; k < end; ++k, b += ldb) {
    V bk[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) bk[j] = read<V>(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      V aik = spread<V, Step>((const char*)a[i] + k * sizeof(Step));
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) c[i][j] = multiply_add<Words>(aik, bk[j], c[i][j]);
    }
  }
}

// Something else may be done before each few steps: fetching ahead pays where it is spread evenly.
// With 16 registers GCC spills in loops of so few.
constexpr int64_t kFewSteps = kLanes == 16 ? 4 : 16;

// By vectors: what GCC makes of an empty initializer takes longer than a short chain.
template <class V, int rows, int vectors>
FASTADAPTERS_INLINE void clear(V (&c)[rows][vectors]) {
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) c[i][j] = V{};
}

// From registers to registers, or by way of memory.
template <bool in_registers, class V, int rows, int vectors>
FASTADAPTERS_INLINE void copy(const V (&from)[rows][vectors], V (&to)[rows][vectors]) {
  if constexpr (in_registers) {
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) to[i][j] = from[i][j];
  } else {
    std::memcpy(to, from, sizeof from);
  }
}

// c += one chain; before(k) comes before each few steps.
template <class Words, class Step, class V, int rows, int vectors, class Before>
FASTADAPTERS_INLINE void add_chain(int64_t k, int64_t end, const float* const (&a)[rows],
                                   const float* b, int64_t ldb, V (&c)[rows][vectors],
                                   const Before& before) {
  for (; kLanes == 16 && k + kFewSteps <= end; k += kFewSteps) {
    before(k);
    add_products<Words, Step>(k, k + kFewSteps, a, b, ldb, c);
  }
  for (; k < end; k += kFewSteps) {
    before(k);
    add_products<Words, Step>(k, least(k + kFewSteps, end), a, b, ldb, c);
  }
}

// c = the sum, chain by chain; before(k) comes before each few steps.
template <class Words, class Step = int32_t, int64_t chain = kChain, class V, int rows, int vectors,
          class Before>
FASTADAPTERS_INLINE void sum_products(int64_t steps, const float* const (&a)[rows], const float* b,
                                      int64_t ldb, V (&c)[rows][vectors], const Before& before) {
  constexpr bool fits = kLanes == 16 && rows * vectors <= 12;  // a second block in registers
  clear(c);
  add_chain<Words, Step>(0, least(steps, chain), a, b, ldb, c, before);
  if (steps <= chain) return;
  V total[rows][vectors];
  copy<fits>(c, total);
  for (int64_t k = chain; k < steps; k += chain) {
    if constexpr (!fits) asm("" : "+m"(total));  // in memory, for the chain needs the registers
    V part[rows][vectors];
    clear(part);
    add_chain<Words, Step>(k, least(steps, k + chain), a, b, ldb, part, before);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) total[i][j] += part[i][j];
  }
  copy<fits>(total, c);
}

// Row i of m and those behind it, the last one again where there are no more.
template <int rows, class Row>
FASTADAPTERS_INLINE void block_of_rows(int64_t i, int64_t m, const Row& row,
                                       const float* (&a)[rows]) {
#pragma GCC unroll 8
  for (int l = 0; l < rows; ++l) a[l] = row(least(i + l, m - 1));
}

// The first n rows of a block; f(v, row, vector).
template <class V, int rows, int vectors, class F>
FASTADAPTERS_INLINE void each_vector(const V (&c)[rows][vectors], int64_t n, const F& f) {
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
    if (i < n)
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) f(c[i][j], i, j);
}

// C [m, n] = A [m, k] B [k, n], or += it, for n = vectors * kLanes.
template <bool add, int64_t chain, class V, int vectors>
void multiply_columns(int64_t m, int64_t k, const float* a, int64_t lda, const float* b,
                      int64_t ldb, float* c, int64_t ldc) {
  constexpr int rows = kBlockRows<vectors>;
  for (int64_t i = 0; i < m; i += rows) {
    const float* block[rows];
    block_of_rows(i, m, [&](int64_t row) { return a + row * lda; }, block);
    V sum[rows][vectors];
    sum_products<Single, int32_t, chain>(k, block, b, ldb, sum, [](int64_t) {});
    each_vector(sum, m - i, [&](V v, int l, int j) {
      float* to = c + (i + l) * ldc + j * kLanes;
      write(to, add ? read<V>(to) + v : v);
    });
  }
}

// The same for any number of columns. Whole vectors are written: where rows of C are shorter (only
// without `add`) a row overwrites the head of the next, which therefore comes later, and C needs
// room for one vector behind it.
template <bool add, int64_t chain = kChain>
void multiply(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
              int64_t columns, float* c, int64_t ldc) {
  Columns n(columns);
  for (int64_t p = n.count - 1; p >= 0; --p) {
    int64_t first = n.first(p) * kLanes;
    with_panel(n, p, [&](auto* v, auto vectors) {
      using V = std::remove_pointer_t<decltype(v)>;
      multiply_columns<add, chain, V, vectors>(m, k, a, lda, b + first, ldb, c + first, ldc);
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

// A packed B = W^T, from W [n, k].
inline void pack_transposed(const float* w, int64_t k, Columns n, int64_t n_columns, int64_t depth,
                            float* b) {
  for (int64_t p = 0; p < n.count; ++p) {
    int64_t first = n.first(p) * kLanes, width = n.size(p) * kLanes;
    transpose_into(w + first * k, k, least(width, n_columns - first), k, b + depth * first, width);
  }
}

// A packed B = W, from W [k, n].
template <class Words = Single>
inline void pack(const float* w, int64_t k, Columns n, int64_t n_columns, float* b) {
  for (int64_t p = 0; p < n.count; ++p) {
    int64_t first = n.first(p) * kLanes, width = n.size(p) * kLanes;
    for (int64_t i = 0; i < divide_up(k, Words::kPerWord); ++i)
      for (int64_t j = 0; j < width; j += kLanes)
        store(b + k * first + i * width + j, Words::across_rows(i, [&](int64_t row) {
                int64_t n = Words::kPerWord == 1 || row < k ? n_columns - first - j : 0;
                return load(w + row * n_columns + first + j, n);
              }));
  }
}

// A packed B of fp32 as words, in place; its rows from k to `depth` become 0.
template <class Words>
inline void to_words(Columns n, int64_t k, int64_t depth, float* b) {
  for (int64_t p = 0; p < n.count; ++p) {
    int64_t width = n.size(p) * kLanes;
    float* panel = b + depth * n.first(p) * kLanes;
    for (int64_t i = Words::kPerWord == 1 ? k : 0; i < depth / Words::kPerWord; ++i)
      for (int64_t j = 0; j < width; j += kLanes)
        store(panel + i * width + j, Words::across_rows(i, [&](int64_t row) {
                return row < k ? read<Vec>(panel + row * width + j) : Vec{};
              }));
  }
}

// Two words of k side by side for each column of a narrow B, packed as usual, in place.
inline void fold(Columns n, int64_t k, float* b) {
  if (!n.narrow) return;
  for (int64_t i = 0; i < k; i += 2)
    store(b + i / 2 * kLanes,
          interleave_low(read<Vec>(b + i * kLanes), read<Vec>(b + (i + 1) * kLanes),
                         std::make_index_sequence<kLanes>()));
}

}  // namespace
}  // namespace fastadapters::cpu

// What forward and backward have in common: how the work is cut, and what the products are made of.
#pragma once

#include <vector>

#include "../../sequence_fusion.h"
#include "../activation.h"
#include "../scratch.h"
#include "product.h"

namespace fastadapters::cpu {
namespace {

inline int64_t item_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// As round_to, without leaving the lanes of fp32.
inline Vec round_to_bfloat16(Vec v) {
  Word bits = (Word)v;
  Word rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  return v == v ? (Vec)rounded : (Vec)(Word{} + 0x7fc00000);
}

// Rounded to the dtype of the products.
inline Vec round_as(Dtype dtype, Vec v) {
  return dtype == Dtype::float32    ? v
         : dtype == Dtype::bfloat16 ? round_to_bfloat16(v)
                                    : round_to<float16>(v);
}

// f(read), where read(row, j, n) gives what the products see of a row in memory from column j on,
// n columns at most.
template <class F>
FASTADAPTERS_INLINE void with_reader(Dtype stored, Dtype dtype, const F& f) {
  if (stored == Dtype::bfloat16)
    f([](const void* row, int64_t j, int64_t n) { return load((const bfloat16*)row + j, n); });
  else if (stored == Dtype::float16)
    f([](const void* row, int64_t j, int64_t n) { return load((const float16*)row + j, n); });
  else if (dtype == Dtype::float32)
    f([](const void* row, int64_t j, int64_t n) { return load((const float*)row + j, n); });
  else
    f([dtype](const void* row, int64_t j, int64_t n) {
      return round_as(dtype, load((const float*)row + j, n));
    });
}

// The n values from `data` on, in their own dtype, rounded to `dtype`; what is stored as it is not
// rounded before.
template <class T>
inline void read_values(const void* data, Dtype stored, Dtype dtype, int64_t n, T* out) {
  with_reader(stored, std::is_same_v<T, float> ? dtype : Dtype::float32, [&](auto read) {
    for (int64_t j = 0; j < n; j += kLanes) store(out + j, read(data, j, n - j));
  });
}

// n fp32 values to memory of any dtype.
inline void write_values(const float* values, int64_t n, void* out, Dtype dtype) {
  with_type({out, dtype}, [&](auto* to) {
    for (int64_t j = 0; j < n; j += kLanes) store(to + j, read<Vec>(values + j), n - j);
  });
}

// A token, or a row of the result, in memory.
inline char* row_of(const Rows& rows, Dtype dtype, int64_t item, int64_t token) {
  return (char*)rows.data + (item * rows.strides[1] + token * rows.strides[2]) * item_size(dtype);
}

// How many tokens of an item count.
inline int64_t counted(const Modality& m, int64_t item) {
  return m.lengths ? greatest(0, least(m.lengths[item], m.tokens)) : m.tokens;
}

// Consecutive rows of one modality: all tokens of some items, or a part of one item's. The cut
// depends on the tokens that count alone.
struct Unit {
  int modality;
  int64_t item, items;
  int64_t token, rows;  // the first token, and how many altogether

  // f(item, row, n): the item's n tokens are the rows from `row` on.
  template <class F>
  void each(const Modality& m, const F& f) const {
    if (items == 1) return f(item, 0, rows);
    for (int64_t i = item, row = 0; i < item + items; ++i) {
      int64_t n = counted(m, i);
      if (n) f(i, row, n);
      row += n;
    }
  }
};

// Appends the units of modality m, of at most `limit` rows each.
inline void cut(const SequenceFusion& p, int m, int64_t limit, std::vector<Unit>& units) {
  Unit open{m, 0, 0, 0, 0};
  auto close = [&] {
    if (open.rows) units.push_back(open);
  };
  for (int64_t item = 0; item < p.items; ++item) {
    int64_t n = counted(p.modality[m], item);
    if (n <= limit && open.rows + n <= limit) {
      open.items += 1;
      open.rows += n;
      continue;
    }
    close();
    open = {m, item, 1, 0, n};
    if (n <= limit) continue;
    for (int64_t token = 0; token < n; token += limit)
      units.push_back({m, item, 1, token, least(limit, n - token)});
    open = {m, item + 1, 0, 0, 0};
  }
  close();
}

// The rows of a unit in memory.
inline void collect_rows(const Modality& m, const Rows& rows, Dtype dtype, const Unit& unit,
                         const char** out) {
  unit.each(m, [&](int64_t item, int64_t row, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[row + i] = row_of(rows, dtype, item, unit.token + i);
  });
}

// How many tasks n units are worth: of some tens of microseconds each.
inline int64_t count_tasks(const SequenceFusion& p, const Threads& threads, int64_t n) {
  int64_t work = 0;
  for (int m = 0; m < p.modalities; ++m) {
    const Modality& modality = p.modality[m];
    int64_t r = modality.width, products = p.rank() * p.out_len * r;
    work += p.items * (modality.tokens * (modality.dim * r + products + 32 * r) + products * p.dim);
  }
  return greatest(1, least(least(threads.count, n), work >> 20));
}

// f(begin, end) for contiguous ranges of n units.
template <class F>
inline void in_tasks(const SequenceFusion& p, const Threads& threads, int64_t n, const F& f) {
  int64_t tasks = count_tasks(p, threads, n);
  parallel(threads, tasks, [&](int64_t t) { f(n * t / tasks, n * (t + 1) / tasks); });
}

// The parameters [ranks, n] as fp32 rounded to the dtype of the products, summed over the ranks if
// the op has them so; where they are if nothing is to be done, else in a copy.
struct Values {
  Parameter from;
  int64_t ranks, n;
  Dtype dtype;
  float* copy;

  Values(Carver& c, const Parameter& from, int64_t ranks, int64_t n, bool summed, Dtype dtype)
      : from(from), ranks(summed ? ranks : 1), n(summed ? n : ranks * n), dtype(dtype) {
    bool as_is = this->ranks == 1 && dtype == Dtype::float32 && from.dtype == dtype;
    copy = c.take<float>(this->n + kLanes, from.data && !as_is);
  }
  const float* get() const {
    if (!copy) return (const float*)from.data;
    with_type(from, [&](auto* data) {
      for (int64_t j = 0; j < n; j += kLanes) {
        Vec v = {};
        for (int64_t q = 0; q < ranks; ++q) v += load(data + q * n + j, n - j);
        store(copy + j, round_as(dtype, v));
      }
    });
    return copy;
  }
};

// Wd^T as the B of x Wd^T, and the bias.
struct Down {
  Columns columns;
  int64_t depth;  // D in whole folded words
  Values weights, constants;
  float *packed, *bias;

  Down(Carver& c, const SequenceFusion& p, const Modality& m)
      : columns(m.width),
        depth(round_up(m.dim, 4)),
        weights(c, m.down_weight, 1, m.width * m.dim, false, p.dtype),
        constants(c, m.down_bias, 1, m.width, false, p.dtype),
        packed(c.take<float>(depth * columns.columns())),
        bias(c.take<float>(columns.columns())) {}

  template <class Words>
  void pack(const Modality& m) const {
    pack_transposed(weights.get(), m.dim, columns, m.width, depth, packed);
    to_words<Words>(columns, m.dim, depth, packed);
    fold(columns, depth / Words::kPerWord, packed);
    const float* given = constants.get();
    for (int64_t j = 0; j < columns.columns(); j += kLanes)
      store(bias + j, given ? load(given + j, m.width - j) : Vec{});
  }
};

// U_q [r, D] as the B of P U, for each q.
struct Up {
  Columns columns;
  Values factors;
  float* packed;  // [R, panels of r rows]

  Up(Carver& c, const SequenceFusion& p, const Modality& m)
      : columns(p.dim),
        factors(c, m.feature_factor, p.feature_rank, m.width * p.dim, p.summed, p.dtype),
        packed(c.take<float>(p.rank() * m.width * columns.columns())) {}

  void pack(const SequenceFusion& p, const Modality& m) const {
    const float* values = factors.get();
    for (int64_t q = 0; q < p.rank(); ++q)
      cpu::pack(values + q * m.width * p.dim, m.width, columns, p.dim,
                packed + q * m.width * columns.columns());
  }
  const float* panel(const Modality& m, int64_t q, int64_t i) const {
    return packed + m.width * (q * columns.columns() + columns.first(i) * kLanes);
  }
};

// Whether rows of x in memory are rows of words.
template <class Words>
bool in_place(const SequenceFusion& p, const Modality& m) {
  return m.x_dtype == p.dtype && item_size(p.dtype) == sizeof(typename Words::Store);
}

// z [m, r] of rows in memory, the next ones of which are fetched meanwhile: x has `follow` rows
// more than it has to multiply.
template <class Words, class Step, int rows>
void project_rows(const SequenceFusion& p, const Modality& m, const Down& down,
                  const char* const* x, int64_t count, int64_t follow, float* stage, float* z) {
  using Store = typename Words::Store;
  constexpr int64_t per_step = sizeof(Step) / sizeof(Store);
  const bool as_is = in_place<Words>(p, m) && m.dim % per_step == 0;
  const int64_t size = item_size(m.x_dtype), stride = round_up(m.dim, kLanes);
  const int64_t r = m.width, d = m.dim;
  const float* bias = down.bias;
  // In so many turns a line of words of each row is fetched, or in one several; what is stored in
  // fp32 is twice as long as words of bf16.
  constexpr int64_t some = kFewSteps * sizeof(Step), turns = some < 64 ? 64 / some : 1;
  constexpr int64_t bytes = turns * some;
  const bool twice = size > int64_t(sizeof(Store));
  for (int64_t i = 0; i < count; i += rows) {
    const float* a[rows];
    const char* next[rows + turns];
    block_of_rows(i, count, [&](int64_t row) { return (const float*)x[row]; }, a);
    for (int l = 0; !as_is && l < rows; ++l) {
      auto* staged = (Store*)stage + least(l, count - 1 - i) * stride;
      if (i + l < count) read_values(a[l], m.x_dtype, p.dtype, m.dim, staged);
      a[l] = (const float*)staged;
    }
    for (int l = 0; l < rows + turns; ++l) next[l] = x[least(i + rows + l, count + follow - 1)];
    for (int64_t panel = down.columns.count - 1; panel >= 0; --panel) {
      int64_t first = down.columns.first(panel) * kLanes;
      // Inlined by force: GCC drops calls of functions that do nothing but fetch.
      auto fetch = [&](int64_t step) __attribute__((always_inline)) {
        const int64_t turn = step / kFewSteps % turns;
        const int64_t at = (step - turn * kFewSteps) * per_step * size;
        if (panel == 0)
#pragma GCC unroll 8
          for (int l = 0; l < rows; l += turns) {
            const char* from = next[turn + l] + at;
            prefetch_columns<0, 3>(from, bytes);
            if (twice) prefetch_columns<0, 3>(from + bytes, bytes);
          }
      };
      with_constant<Columns::kPanel>(down.columns.size(panel), [&](auto vectors) {
        if constexpr (rows <= kBlockRows<vectors>) {
          Vec sum[rows][vectors];
          sum_products<Words, Step>(divide_up(d, per_step), a, down.packed + down.depth * first,
                                    vectors * kLanes, sum, fetch);
          each_vector(sum, count - i, [&](Vec v, int l, int j) {
            if constexpr (sizeof(Step) == 8)
              v = add_neighbours(v, std::make_index_sequence<kLanes>());
            int64_t column = first + j * kLanes;
            store(z + (i + l) * r + column, v + read<Vec>(bias + column));
          });
        }
      });
    }
  }
}

// The rows of `z` are as short as they are; behind the last one is room for a vector.
template <class Words>
inline void project(const SequenceFusion& p, const Modality& m, const Down& down,
                    const char* const* x, int64_t count, int64_t follow, float* stage, float* z) {
  if (down.columns.narrow)
    project_rows<Words, int64_t, kBlockRows<1>>(p, m, down, x, count, follow, stage, z);
  else if (down.columns.vectors == 1)
    project_rows<Words, int32_t, kBlockRows<1>>(p, m, down, x, count, follow, stage, z);
  else if (down.columns.vectors == 2)
    project_rows<Words, int32_t, kBlockRows<2>>(p, m, down, x, count, follow, stage, z);
  else
    project_rows<Words, int32_t, kBlockRows<3>>(p, m, down, x, count, follow, stage, z);
}

inline int64_t widest(const SequenceFusion& p) {
  int64_t r = 0;
  for (int m = 0; m < p.modalities; ++m) r = greatest(r, p.modality[m].width);
  return r;
}

// What `project` needs for rows that it cannot read in place.
inline int64_t stage_size(const SequenceFusion& p) {
  int64_t widest = 0;
  for (int m = 0; m < p.modalities; ++m) widest = greatest(widest, p.modality[m].dim);
  return 8 * round_up(widest, kLanes);
}

// The residual made of leading tokens: calls f(modality, row, n) for each modality whose first n >
// 0 tokens are laid from row `row` of the item's result on.
template <class F>
inline void leading_tokens(const SequenceFusion& p, int64_t item, const F& f) {
  for (int64_t m = 0, row = 0; m < p.modalities && row < p.out_len; ++m) {
    int64_t n = least(counted(p.modality[m], item), p.out_len - row);
    if (n) f(int(m), row, n);
    row += n;
  }
}

// Saved P of an item: [R, T_o, r].
inline float* products_of(const SequenceFusion& p, int m, int64_t item) {
  int64_t offset = 0;
  for (int i = 0; i < m; ++i) offset += p.items * p.rank() * p.out_len * p.modality[i].width;
  return p.products + offset + item * p.rank() * p.out_len * p.modality[m].width;
}

// Saved z of a token.
inline char* z_of(const SequenceFusion& p, int m, int64_t item, int64_t token) {
  int64_t offset = 0;
  for (int i = 0; i < m; ++i) offset += p.items * p.modality[i].tokens * p.modality[i].width;
  const Modality& own = p.modality[m];
  offset += (item * own.tokens + token) * own.width;
  return (char*)p.z + offset * item_size(p.dtype);
}

// The saved z of tokens that do not count is 0.
inline void clear_uncounted(const SequenceFusion& p, int64_t first, int64_t items) {
  for (int m = 0; p.z && m < p.modalities; ++m)
    for (int64_t item = first; item < first + items; ++item) {
      int64_t n = counted(p.modality[m], item), rest = p.modality[m].tokens - n;
      std::memset(z_of(p, m, item, n), 0, rest * p.modality[m].width * item_size(p.dtype));
    }
}

// Rows of the result, of several items, that are multiplied at a time.
constexpr int64_t kResultRows = 32;

inline int64_t items_at_a_time(const SequenceFusion& p) {
  return greatest(1, kResultRows / p.out_len);
}

}  // namespace
}  // namespace fastadapters::cpu

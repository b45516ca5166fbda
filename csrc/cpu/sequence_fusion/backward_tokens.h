// The second half of backward: from dP to dA, dWd, the bias and dx.
#pragma once

#include "gradients.h"

namespace fastadapters::cpu {
namespace {

template <class Words>
struct UnitTask {
  static constexpr bool kPairs = Words::kPerWord == 2;
  float *stage, *h, *dz, *staged, *d_products;
  typename Words::Store* dz_rows;  // words of dz are along r
  float* dz_columns;               // words of dz are along the tokens
  const char **x, **next, **add;   // rows of this unit, of the next one, of what joins dx
  char** dx;
  const float** values;  // rows of x as words along the tokens
  UnitTask(Carver& c, const SequenceFusionBackward& p)
      : stage(c.take<float>(stage_size(p))),
        h(c.take<float>(kMostRows * widest(p) + kLanes)),
        dz(c.take<float>(kMostRows * widest(p) + kLanes)),
        staged(c.take<float>(largest_unit(p))),
        d_products(c.take<float>(widest(p) * round_up(p.rank() * p.out_len, kLanes))),
        x(c.take<const char*>(kMostRows)),
        next(c.take<const char*>(kMostRows)),
        add(c.take<const char*>(kMostRows)),
        dx(c.take<char*>(kMostRows)),
        values(c.take<const float*>(kMostRows)) {
    dz_rows = (decltype(dz_rows))dz;
    dz_columns = dz;
    if (!kPairs) return;
    int64_t width = round_up(widest(p), 2);
    dz_rows = c.take<typename Words::Store>(kMostRows * width + kLanes);
    dz_columns = c.take<float>(kMostRows / 2 * width + kLanes);
  }

  static int64_t largest_unit(const SequenceFusionBackward& p) {
    int64_t n = 0;
    for (int i = 0; i < p.modalities; ++i) {
      const Modality& m = p.modality[i];
      if (kPairs || !in_place<Words>(p, m))
        n = greatest(n, unit_rows(m.dim) / Words::kPerWord * round_up(m.dim, kLanes));
    }
    return n;
  }
};

// z of a unit in task.h, as saved or made again.
template <class Words>
inline void find_z(const SequenceFusionBackward& p, const BackwardModality& own, const Unit& unit,
                   const UnitTask<Words>& task) {
  const Modality& m = p.modality[unit.modality];
  if (!p.z) return project<Words>(p, m, own.down, task.x, unit.rows, 0, task.stage, task.h);
  unit.each(m, [&](int64_t item, int64_t row, int64_t n) {
    read_values(z_of(p, unit.modality, item, unit.token), p.dtype, p.dtype, n * m.width,
                task.h + row * m.width);
  });
}

// Fetches n rows of as many lines into the second-level cache, a share with each call.
struct Fetch {
  const char* const* rows;
  int64_t n, lines, share = 0;
  int64_t row = 0, line = 0;

  void spread(int64_t calls) { share = divide_up(n * lines, calls); }
  FASTADAPTERS_INLINED void operator()() {
    int64_t i = row, j = line;  // in registers: a fetch is a barrier to GCC
    for (int64_t left = share; left > 0 && i < n; --left) {
      __builtin_prefetch(rows[i] + 64 * j, 0, 2);
      if (++j == lines) j = 0, ++i;
    }
    row = i;
    line = j;
  }
};

// One panel of dx = dz Wd + add for a block of rows. Under the product is fetched what the `next`
// one writes, a share of its rows with each few steps.
template <class T, class Words, int rows, int vectors>
FASTADAPTERS_INLINE void write_dx_block(int64_t n, int64_t words, int64_t d, const float* dz,
                                        const float* down, int64_t column, char* const* dx,
                                        char* const* next, int64_t share, const char* const* add,
                                        Fetch& fetch) {
  const float* a[rows];
  block_of_rows(0, n, [&](int64_t row) { return dz + row * words; }, a);
  int64_t fetched = 0;
  Vec sum[rows][vectors];
  sum_products<Words>(words, a, down, vectors * kLanes, sum, [&](int64_t) FASTADAPTERS_INLINED {
    fetch();
    for (int64_t end = least(fetched + share, n); fetched < end; ++fetched)
      prefetch_columns<1, 3>((T*)next[fetched] + column, vectors * kLanes);
  });
  auto write = [&](auto left) FASTADAPTERS_INLINED {
#pragma GCC unroll 8
    for (int l = 0; l < rows; ++l) {
      if (l >= n) break;
      T* to = (T*)dx[l] + column;
      const T* more = add[l] ? (const T*)add[l] + column : nullptr;
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) {
        Vec v = sum[l][j];
        if (more) v += load(more + j * kLanes, left(j));
        store(to + j * kLanes, v, left(j));
      }
    }
  };
  if (d - column >= vectors * kLanes)
    write([](int) { return std::integral_constant<int64_t, kLanes>(); });
  else
    write([&](int j) { return d - column - j * kLanes; });
}

template <class T, class Words>
inline void write_dx(const Modality& m, const BackwardModality& own, int64_t rows,
                     const UnitTask<Words>& task, Fetch fetch) {
  constexpr int block = kBlockRows<Columns::kPanel>;
  const int64_t r = m.width, d = m.dim, words = divide_up(r, Words::kPerWord);
  const int64_t calls = divide_up(words, kFewSteps), share = divide_up(block, calls);
  fetch.spread(divide_up(rows, block) * own.columns.count * calls);
  for (int64_t i = 0; i < rows; i += block) {
    char* const* next = task.dx + greatest(0, least(i + block, rows - block));
    for (int64_t panel = 0; panel < own.columns.count; ++panel) {
      int64_t column = own.columns.first(panel) * kLanes;
      with_constant<Columns::kPanel>(own.columns.size(panel), [&](auto vectors) {
        write_dx_block<T, Words, block, vectors>(
            least(block, rows - i), words, d, (const float*)task.dz_rows + i * words,
            own.down_rows + r * column, column, task.dx + i, next, share, task.add + i, fetch);
      });
    }
  }
}

// Row i of words along the tokens: of a row of values and its neighbour, if there is one.
inline void interleave(const char* row, const char* next, Dtype dtype, int64_t n, float* out) {
  auto words = [&](int64_t j, auto left) FASTADAPTERS_INLINED {
    if (dtype == Dtype::bfloat16)
      return Pair::interleave((const bfloat16*)row + j, next ? (const bfloat16*)next + j : nullptr,
                              left);
    return Pair::across_rows(0, [&](int64_t i) {
      return i == 0 ? load((const float*)row + j, left)
             : next ? load((const float*)next + j, left)
                    : Vec{};
    });
  };
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    store(out + j, words(j, std::integral_constant<int64_t, kLanes>()));
  if (j < n) store(out + j, words(j, n - j));
}

// The rows of a unit as words along the tokens.
template <class Words>
const float* const* words_of(const SequenceFusion& p, const Modality& m, int64_t rows,
                             const UnitTask<Words>& task) {
  int64_t stride = round_up(m.dim, kLanes);
  if constexpr (Words::kPerWord == 2) {
    for (int64_t i = 0; i < rows; i += 2) {
      float* to = task.staged + i / 2 * stride;
      interleave(task.x[i], i + 1 < rows ? task.x[i + 1] : nullptr, m.x_dtype, m.dim, to);
      task.values[i / 2] = to;
    }
    return task.values;
  }
  if (in_place<Words>(p, m)) return (const float* const*)task.x;
  for (int64_t i = 0; i < rows; ++i) {
    read_values(task.x[i], m.x_dtype, p.dtype, m.dim, task.staged + i * stride);
    task.values[i] = task.staged + i * stride;
  }
  return task.values;
}

// dz of a unit as words.
template <class Words>
inline void make_words(int64_t rows, int64_t r, const UnitTask<Words>& task) {
  if constexpr (Words::kPerWord == 2) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < r; j += kLanes)
        store(task.dz_rows + i * round_up(r, 2) + j,
              first_lanes(read<Vec>(task.dz + i * r + j), r - j));
    for (int64_t i = 0; i < divide_up(rows, 2); ++i)
      for (int64_t j = 0; j < r; j += kLanes)
        store(task.dz_columns + i * r + j, Words::across_rows(i, [&](int64_t row) {
                return row < rows ? read<Vec>(task.dz + row * r + j) : Vec{};
              }));
  }
}

// sums [count, vectors] += the sum over n rows t of value(t, i) times vector(t, j); the first
// `wanted` of the `count`.
template <class Words, int count, int vectors, class Value, class Vector>
FASTADAPTERS_INLINE void add_outer_products(int64_t n, const Value& value, const Vector& vector,
                                            int64_t wanted, float* sums, int64_t stride) {
  Vec sum[count][vectors];
  clear(sum);
  for (int64_t t = 0; t < n; ++t) {
    Vec row[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) row[j] = vector(t, j);
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      Vec v = spread<Vec, int32_t>(value(t, i));
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) sum[i][j] = Words::multiply_add(v, row[j], sum[i][j]);
    }
  }
  each_vector(sum, wanted, [&](Vec v, int i, int j) {
    float* to = sums + i * stride + j * kLanes;
    store(to, read<Vec>(to) + v);
  });
}

// dWd^T [D, r] += x^T dz, a few rows at a time: the lines where they are read, which may be some
// multiple of 1 KB apart, then have room in the first-level cache.
template <class Words>
inline void add_down_gradient(int64_t rows, const float* const* x, int64_t d, const float* dz,
                              int64_t r, float* sums, Fetch fetch) {
  constexpr int64_t strip = 48, few = 16;  // a strip is whole blocks of any panel
  const Columns panels(r);
  fetch.spread(divide_up(rows, few) * panels.count * divide_up(d, 8));
  for (int64_t t = 0; t < rows; t += few)
    for (int64_t first = 0; first < d; first += strip)
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        int64_t at = panels.first(panel) * kLanes;
        with_constant<Columns::kPanel>(panels.size(panel), [&](auto vectors) {
          constexpr int block = kBlockRows<vectors>;
          int64_t n = least(few, rows - t), stride = panels.columns();
          auto vector = [&](int64_t i, int j) {
            return read<Vec>(dz + (t + i) * r + at + j * kLanes);
          };
          for (int64_t column = first; column < least(d, first + strip); column += block) {
            float* to = sums + column * stride + at;
            const float* const* from = x + t;
            fetch();
            if (d - column >= block)
              add_outer_products<Words, block, vectors>(
                  n, [&](int64_t i, int l) { return from[i] + column + l; }, vector, block, to,
                  stride);
            else
              add_outer_products<Words, block, vectors>(
                  n, [&](int64_t i, int l) { return from[i] + least(column + l, d - 1); }, vector,
                  d - column, to, stride);
          }
        });
      }
}

// dWd [r, D] += dz^T x, where vectors along r would have idle lanes.
template <class Words>
inline void add_narrow_down_gradient(int64_t rows, const float* const* x, const Columns& columns,
                                     int64_t d, const float* dz, int64_t r, float* sums,
                                     Fetch fetch) {
  constexpr int64_t few = 32;
  fetch.spread(divide_up(rows, few) * columns.count);
  for (int64_t t = 0; t < rows; t += few)
    for (int64_t panel = 0; panel < columns.count; ++panel) {
      int64_t column = columns.first(panel) * kLanes, n = least(few, rows - t);
      const float* rows_of_dz = dz + t * r;  // beyond r is room, or the next row
      fetch();
      with_constant<Columns::kPanel>(columns.size(panel), [&](auto vectors) {
        constexpr int block = kBlockRows<vectors>;
        static_assert(block >= kLanes / 2);  // all of r is one block
        auto add = [&](auto left) FASTADAPTERS_INLINED {
          add_outer_products<Words, block, vectors>(
              n, [&](int64_t i, int l) { return rows_of_dz + i * r + l; },
              [&](int64_t i, int j) { return load(x[t + i] + column + j * kLanes, left(j)); }, r,
              sums + column, columns.columns());
        };
        const int64_t last = d - column - (vectors - 1) * kLanes;  // only the last may be shorter
        if (last >= kLanes)
          add([](int) { return std::integral_constant<int64_t, kLanes>(); });
        else
          add([&](int j) { return j < vectors - 1 ? kLanes : last; });
      });
    }
}

// Everything behind dP, for the tokens of a unit; those of the `next` one are fetched meanwhile.
template <class Words>
inline void differentiate_tokens(const SequenceFusionBackward& p, BackwardModality& own, int64_t t,
                                 const Unit& unit, const Unit* next, const UnitTask<Words>& task) {
  const Modality& m = p.modality[unit.modality];
  const auto& gradients = p.gradients[unit.modality];
  int64_t r = m.width, products = p.rank() * p.out_len;
  auto products_of_item = [&](int64_t item) {
    return own.products + item * products * own.r_stride;
  };
  if (own.needs.x) collect_rows(m, m.x, m.x_dtype, unit, task.x);
  find_z(p, own, unit, task);

  if (own.needs.dz)
    unit.each(m, [&](int64_t item, int64_t row, int64_t n) {
      multiply<false>(n, products, own.time + unit.token * products, products,
                      products_of_item(item), own.r_stride, r, task.dz + row * r, r);
    });
  for (int64_t j = 0; j < unit.rows * r; j += kLanes) {
    Vec z = read<Vec>(task.h + j);
    Activated a = activate(p.activation, z);
    store(task.h + j, a.value);
    if (own.needs.dz) store(task.dz + j, backpropagate(p.activation, z, a, read<Vec>(task.dz + j)));
  }
  if (own.needs.time) {
    unit.each(m, [&](int64_t item, int64_t row, int64_t n) {
      transpose_into(products_of_item(item), own.r_stride, products, r, task.d_products,
                     own.time_columns);
      multiply<true>(n, r, task.h + row * r, r, task.d_products, own.time_columns, own.time_columns,
                     own.d_time[t].part + unit.token * own.time_columns, own.time_columns);
    });
    own.d_time[t].advance(unit.rows);
  }
  for (int64_t c = 0; own.needs.bias && c < r; c += kLanes)
    for (int64_t first = 0; first < unit.rows; first += kChain) {
      Vec total = {};
      for (int64_t i = first; i < least(unit.rows, first + kChain); ++i)
        total += read<Vec>(task.dz + i * r + c);
      for (int64_t l = 0; l < least(kLanes, r - c); ++l) own.d_bias[t].total[c + l] += total[l];
    }
  if (own.needs.down || own.needs.dx) make_words(unit.rows, r, task);
  // Of the next unit: under dx, where products of pairs are not too short for it.
  bool follows = own.needs.down && next && next->modality == unit.modality;
  if (follows) collect_rows(m, m.x, m.x_dtype, *next, task.next);
  const Fetch none{},
      all{task.next, follows ? next->rows : 0, divide_up(m.dim * item_size(m.x_dtype), 64)};
  if (own.needs.down) {
    const float* const* x = words_of(p, m, unit.rows, task);
    const Fetch& ahead = own.needs.dx && !task.kPairs ? none : all;
    int64_t words = divide_up(unit.rows, Words::kPerWord);
    if (own.narrow())
      add_narrow_down_gradient<Words>(words, x, own.columns, m.dim, task.dz_columns, r,
                                      own.d_down[t].part, ahead);
    else
      add_down_gradient<Words>(words, x, m.dim, task.dz_columns, r, own.d_down[t].part, ahead);
    own.d_down[t].advance(unit.rows);
  }
  if (own.needs.dx) {
    unit.each(m, [&](int64_t item, int64_t row, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        task.dx[row + i] = row_of(gradients.dx, m.x_dtype, item, unit.token + i);
        task.add[row + i] = nullptr;
      }
      if (!p.add_leading) return;
      leading_tokens(p, item, [&](int modality, int64_t result, int64_t leading) {
        for (int64_t i = 0; modality == unit.modality && i < n && unit.token + i < leading; ++i)
          task.add[row + i] = row_of(p.dy, p.out_dtype, item, result + unit.token + i);
      });
    });
    with_type({gradients.dx.data, m.x_dtype}, [&](auto* data) {
      write_dx<std::remove_pointer_t<decltype(data)>, Words>(m, own, unit.rows, task,
                                                             task.kPairs ? none : all);
    });
  }
}

}  // namespace
}  // namespace fastadapters::cpu

// Forward: x is read once, y is written once, neither h nor a factor reaches memory.
#pragma once

#include "operands.h"

namespace fastadapters::cpu {
namespace {

// The P of a modality is the sum over splits of this many tokens: whole blocks of any product.
constexpr int64_t kSplit = 120;

// What the calls share about one modality.
struct ForwardModality {
  Down down;
  Up up;
  int64_t products, splits, slot, time_stride;
  Values factors;
  float* time;   // A_q^T for each q: [R T_o, T]
  float* parts;  // P of each split: [B, splits, slot]

  ForwardModality(Carver& c, const SequenceFusion& p, const Modality& m)
      : down(c, p, m),
        up(c, p, m),
        products(p.rank() * p.out_len * m.width),
        splits(divide_up(m.tokens, kSplit)),
        slot(round_up(products + kLanes, kLanes)),
        time_stride(round_up(m.tokens, kLanes)),
        factors(c, m.time_factor, p.time_rank, m.factor_tokens * p.out_len, p.summed, p.dtype),
        time(c.take<float>(p.rank() * p.out_len * time_stride)),
        parts(c.take<float>(p.items * splits * slot)) {}

  template <class Words>
  void pack(const SequenceFusion& p, const Modality& m) const {
    down.pack<Words>(m);
    up.pack(p, m);
    const float* values = factors.get();
    for (int64_t q = 0; q < p.rank(); ++q)
      transpose_into(values + q * m.factor_tokens * p.out_len, p.out_len, m.tokens, p.out_len,
                     time + q * p.out_len * time_stride, time_stride);
  }
};

struct ForwardShared {
  std::vector<ForwardModality> modality;
  ForwardShared(Carver& c, const SequenceFusion& p) {
    for (int m = 0; m < p.modalities; ++m) modality.emplace_back(c, p, p.modality[m]);
  }
};

struct ForwardTask {
  float *stage, *h;
  const char** rows;  // of a unit, and of the next one
  ForwardTask(Carver& c, const SequenceFusion& p)
      : stage(c.take<float>(stage_size(p))),
        h(c.take<float>(kSplit * widest(p) + kLanes)),
        rows(c.take<const char*>(2 * kSplit)) {}
};

// The P of a unit's items, each from the tokens that are in the unit.
template <class Words>
inline void sum_tokens(const SequenceFusion& p, const ForwardModality& shared, const Unit& unit,
                       const Unit* next, const ForwardTask& task) {
  const Modality& m = p.modality[unit.modality];
  int64_t r = m.width;
  collect_rows(m, m.x, m.x_dtype, unit, task.rows);
  if (next) {
    const Modality& other = p.modality[next->modality];
    collect_rows(other, other.x, other.x_dtype, *next, task.rows + unit.rows);
  }
  project<Words>(p, m, shared.down, task.rows, unit.rows, next ? next->rows : 0, task.stage,
                 task.h);
  if (p.z)
    unit.each(m, [&](int64_t item, int64_t row, int64_t n) {
      write_values(task.h + row * r, n * r, z_of(p, unit.modality, item, unit.token), p.dtype);
    });
  for (int64_t j = 0; j < unit.rows * r; j += kLanes)
    store(task.h + j, activate(p.activation, read<Vec>(task.h + j)).value);
  unit.each(m, [&](int64_t item, int64_t row, int64_t n) {
    float* part = shared.parts + (item * shared.splits + unit.token / kSplit) * shared.slot;
    multiply<false, kTokenChain>(p.rank() * p.out_len, n, shared.time + unit.token,
                                 shared.time_stride, task.h + row * r, r, r, part, r);
  });
}

// The rows of the result that belong to a few items.
struct ResultTask {
  float* products[kMaxModalities];  // of each modality [R, rows, r]
  float* tile;
  const char** residual;
  char** y;
  ResultTask(Carver& c, const SequenceFusion& p) {
    int64_t rows = items_at_a_time(p) * p.out_len;
    for (int m = 0; m < p.modalities; ++m)
      products[m] = c.take<float>(p.rank() * rows * p.modality[m].width);
    tile = c.take<float>(rows * Columns::kPanel * kLanes);
    residual = c.take<const char*>(rows);
    y = c.take<char*>(rows);
  }
};

// Sums the splits of P for items from `first` on, and saves the sums.
inline void sum_splits(const SequenceFusion& p, const ForwardShared& shared, int64_t first,
                       int64_t items, const ResultTask& task) {
  for (int i = 0; i < p.modalities; ++i) {
    const Modality& m = p.modality[i];
    const ForwardModality& own = shared.modality[i];
    int64_t n = p.out_len * m.width;  // of one q
    for (int64_t item = first; item < first + items; ++item) {
      int64_t splits = divide_up(counted(m, item), kSplit);
      float* sum = own.parts + item * own.splits * own.slot;
      if (splits == 0) std::memset(sum, 0, own.products * sizeof(float));
      for (int64_t split = 1; split < splits; ++split)
        for (int64_t j = 0; j < own.products; ++j) sum[j] += sum[split * own.slot + j];
      if (p.products) std::memcpy(products_of(p, i, item), sum, own.products * sizeof(float));
      for (int64_t q = 0; q < p.rank(); ++q)
        std::memcpy(task.products[i] + (q * items + item - first) * n, sum + q * n,
                    n * sizeof(float));
    }
  }
}

// One panel of the sum over q of the products over the modalities.
template <int vectors>
void multiply_factors(const SequenceFusion& p, const ForwardShared& shared, int64_t panel,
                      int64_t rows, const ResultTask& task) {
  constexpr int block = kBlockRows<vectors>;
  for (int64_t i = 0; i < rows; i += block)
    for (int64_t q = 0; q < p.rank(); ++q) {
      auto factor = [&](int m, Vec(&out)[block][vectors]) {
        int64_t r = p.modality[m].width;
        const float* products = task.products[m] + q * rows * r;
        const float* a[block];
        block_of_rows(i, rows, [&](int64_t row) { return products + row * r; }, a);
        sum_products<Single>(r, a, shared.modality[m].up.panel(p.modality[m], q, panel),
                             vectors * kLanes, out, [](int64_t) {});
      };
      Vec product[block][vectors];
      for (int m = 0; m < p.modalities; ++m) {
        Vec next[block][vectors];
        asm("" : "+m"(product));  // in memory, for the sum needs the registers
        factor(m, next);
        if (m == 0) {
          std::memcpy(product, next, sizeof next);
          continue;
        }
#pragma GCC unroll 8
        for (int l = 0; l < block; ++l)
#pragma GCC unroll 8
          for (int j = 0; j < vectors; ++j) product[l][j] *= next[l][j];
      }
      each_vector(product, rows - i, [&](Vec v, int l, int j) {
        float* to = task.tile + ((i + l) * vectors + j) * kLanes;
        store(to, q ? read<Vec>(to) + v : v);
      });
    }
}

// y of the items from `first` on.
inline void write_result(const SequenceFusionForward& p, const ForwardShared& shared, int64_t first,
                         int64_t items, const ResultTask& task) {
  sum_splits(p, shared, first, items, task);
  int64_t rows = items * p.out_len;
  for (int64_t item = first, row = 0; item < first + items; ++item)
    for (int64_t i = 0; i < p.out_len; ++i, ++row) {
      task.y[row] = row_of(p.y, p.out_dtype, item, i);
      task.residual[row] = p.residual.data ? row_of(p.residual, p.out_dtype, item, i) : nullptr;
    }
  for (int64_t item = first; p.add_leading && item < first + items; ++item)
    leading_tokens(p, item, [&](int m, int64_t row, int64_t n) {
      for (int64_t i = 0; i < n; ++i)
        task.residual[(item - first) * p.out_len + row + i] =
            row_of(p.modality[m].x, p.out_dtype, item, i);
    });

  const int64_t d = p.dim;
  const Columns columns = shared.modality[0].up.columns;
  for (int64_t panel = 0; panel < columns.count; ++panel) {
    int64_t column = columns.first(panel) * kLanes, width = columns.size(panel) * kLanes;
    int64_t size = item_size(p.out_dtype), begin = column * size,
            end = least(column + width, d) * size;
    for (int64_t row = 0; row < rows; ++row) {
      prefetch_columns<1, 3>(task.y[row] + begin, end - begin);
      if (task.residual[row]) prefetch_columns<0, 3>(task.residual[row] + begin, end - begin);
    }
    with_constant<Columns::kPanel>(columns.size(panel), [&](auto vectors) {
      multiply_factors<vectors>(p, shared, panel, rows, task);
    });
    with_type({p.y.data, p.out_dtype}, [&](auto* y) {
      using T = std::remove_pointer_t<decltype(y)>;
      for (int64_t row = 0; row < rows; ++row) {
        auto* to = (T*)task.y[row];
        const auto* residual = (const T*)task.residual[row];
        for (int64_t j = 0; j < width && column + j < d; j += kLanes) {
          int64_t n = d - column - j;
          Vec v = read<Vec>(task.tile + row * width + j);
          if (residual) v += load(residual + column + j, n);
          store(to + column + j, v, n);
        }
      }
    });
  }
}

// Words are what x and Wd are multiplied as.
template <class Words>
inline void forward(const SequenceFusionForward& p, const Threads& threads) {
  if (p.items == 0) return;
  auto shared = carve<ForwardShared>(shared_scratch(), p);
  std::vector<Unit> units;
  for (int m = 0; m < p.modalities; ++m) {
    shared.modality[m].pack<Words>(p, p.modality[m]);
    cut(p, m, kSplit, units);
  }
  in_tasks(p, threads, int64_t(units.size()), [&](int64_t begin, int64_t end) {
    auto task = carve<ForwardTask>(task_scratch(), p);
    for (int64_t i = begin; i < end; ++i)
      sum_tokens<Words>(p, shared.modality[units[i].modality], units[i],
                        i + 1 < end ? &units[i + 1] : nullptr, task);
  });
  int64_t group = items_at_a_time(p);
  in_tasks(p, threads, divide_up(p.items, group), [&](int64_t begin, int64_t end) {
    auto task = carve<ResultTask>(task_scratch(), p);
    for (int64_t i = begin; i < end; ++i) {
      int64_t first = i * group, items = least(group, p.items - first);
      write_result(p, shared, first, items, task);
      clear_uncounted(p, first, items);
    }
  });
}

}  // namespace
}  // namespace fastadapters::cpu

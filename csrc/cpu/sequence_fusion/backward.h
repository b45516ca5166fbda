// Backward: x and dy are read once, dx is written once.
//
//     F_m = P_mq U_mq                    G_m = dy times the F of all other modalities
//     dU_mq = P_mq^T G_m                 dP_mq = G_m U_mq^T
//     dH_m = sum_q A_mq dP_mq            dA_mq = H_m dP_mq^T
//     dz = dH activation'(z)             dWd = dz^T x, dx = dz Wd (+ dy)
#pragma once

#include "forward.h"
#include "sums.h"

namespace fastadapters::cpu {
namespace {

// Rows that go together through everything behind dP: their x, packed, stays in the second-level
// cache.
constexpr int64_t kUnitBytes = 128 << 10;
constexpr int64_t kMostRows = 128;

inline int64_t unit_rows(int64_t dim) {
  return greatest(16, least(kUnitBytes / (4 * dim) / 16 * 16, kMostRows));
}

// Which intermediate results of a modality the gradients asked for need.
struct Needs {
  bool dx, down, bias, time, up, dz, products, factor, x;
  explicit Needs(const SequenceFusionBackward::Gradients& g, bool saved_z)
      : dx(g.dx.data),
        down(g.d_down_weight.data),
        bias(g.d_down_bias.data),
        time(g.d_time_factor.data),
        up(g.d_feature_factor.data),
        dz(dx || down || bias),
        products(dz || time),
        factor(products || up),
        x(down || (products && !saved_z)) {}
};

struct BackwardModality {
  Needs needs;
  Columns columns;  // of D_m
  int64_t r_stride, time_columns;
  Down down;
  Up up;
  float* up_transposed;  // [R, D, r]
  float* down_rows;      // Wd as the B of dz Wd
  Values factors;
  float* time;                                     // [T, R T_o], if that is not how A is
  float* products;                                 // dP [B, R T_o, r]
  std::vector<Sums> d_down, d_time, d_up, d_bias;  // of each task

  BackwardModality(Carver& c, const SequenceFusionBackward& p, int i, int64_t unit_tasks,
                   int64_t result_tasks)
      : needs(p.gradients[i], p.z),
        columns(p.modality[i].dim),
        r_stride(round_up(p.modality[i].width, kLanes)),
        time_columns(round_up(p.rank() * p.out_len, kLanes)),
        down(c, p, p.modality[i]),
        up(c, p, p.modality[i]),
        up_transposed(c.take<float>(p.rank() * p.dim * r_stride, needs.products)),
        down_rows(c.take<float>(p.modality[i].width * columns.columns(), needs.dx)),
        factors(c, p.modality[i].time_factor, p.time_rank, p.modality[i].factor_tokens * p.out_len,
                p.summed, p.dtype),
        time(c.take<float>(p.modality[i].tokens * p.rank() * p.out_len, p.rank() > 1)),
        products(c.take<float>(p.items * p.rank() * p.out_len * r_stride, needs.products)) {
    const Modality& m = p.modality[i];
    for (int64_t t = 0; t < unit_tasks; ++t) {
      d_down.emplace_back(c, m.width * columns.columns(), needs.down);
      d_time.emplace_back(c, m.tokens * time_columns, needs.time);
      d_bias.emplace_back(c, m.width, needs.bias);
    }
    for (int64_t t = 0; t < result_tasks; ++t)
      d_up.emplace_back(c, p.rank() * m.width * up.columns.columns(), needs.up);
  }

  void pack(const SequenceFusionBackward& p, const Modality& m) {
    if (!p.z && needs.products) down.pack(m);
    up.pack(p, m);
    const float* features = up.factors.get();
    for (int64_t q = 0; needs.products && q < p.rank(); ++q)
      transpose_into(features + q * m.width * p.dim, p.dim, m.width, p.dim,
                     up_transposed + q * p.dim * r_stride, r_stride);
    auto rows = weight(down.weights.get(), m.width, m.dim);
    for (int64_t i = 0; needs.dx && i < columns.count; ++i)
      pack_rows<Gemm<Single>>(rows, columns, i, m.width, down_rows);
    const float* values = factors.get();
    if (!time) {
      time = (float*)values;
      return;
    }
    for (int64_t q = 0; q < p.rank(); ++q)
      for (int64_t t = 0; t < m.tokens; ++t)
        std::memcpy(time + (t * p.rank() + q) * p.out_len,
                    values + (q * m.factor_tokens + t) * p.out_len, p.out_len * sizeof(float));
  }
};

struct BackwardShared {
  std::vector<BackwardModality> modality;
  BackwardShared(Carver& c, const SequenceFusionBackward& p, int64_t unit_tasks,
                 int64_t result_tasks) {
    for (int m = 0; m < p.modalities; ++m) modality.emplace_back(c, p, m, unit_tasks, result_tasks);
  }
};

struct FactorTask {
  int64_t stride;  // of a row of the transposed P
  float *products[kMaxModalities], *transposed[kMaxModalities], *d_products[kMaxModalities];
  float* factors[kMaxModalities];  // F, then G, of one panel
  float* dy;
  FactorTask(Carver& c, const SequenceFusionBackward& p, const BackwardShared& shared) {
    int64_t rows = items_at_a_time(p) * p.out_len;
    int64_t tile = rows * Gemm<Single>::kPanel * kLanes;
    stride = round_up(rows, kLanes);
    for (int i = 0; i < p.modalities; ++i) {
      const Modality& m = p.modality[i];
      products[i] = c.take<float>(p.rank() * rows * m.width + kLanes);
      transposed[i] = c.take<float>(p.rank() * m.width * stride, shared.modality[i].needs.up);
      d_products[i] = c.take<float>(p.rank() * rows * shared.modality[i].r_stride,
                                    shared.modality[i].needs.products);
      factors[i] = c.take<float>(tile);
    }
    dy = c.take<float>(tile);
  }
};

// F of all modalities to G, by products of those in front and of those behind: nothing divides.
inline void leave_one_out(int modalities, int64_t n, const FactorTask& task) {
  for (int64_t j = 0; j < n; j += kLanes) {
    Vec before[kMaxModalities], product = read<Vec>(task.dy + j);
    for (int m = 0; m < modalities; ++m) {
      before[m] = product;
      product *= read<Vec>(task.factors[m] + j);
    }
    product = broadcast(1);
    for (int m = modalities - 1; m >= 0; --m) {
      Vec factor = read<Vec>(task.factors[m] + j);
      store(task.factors[m] + j, before[m] * product);
      product *= factor;
    }
  }
}

// dP and dU of the items from `first` on.
inline void differentiate_products(const SequenceFusionBackward& p, BackwardShared& shared,
                                   int64_t t, int64_t first, int64_t items,
                                   const FactorTask& task) {
  int64_t rows = items * p.out_len, rank = p.rank();
  for (int i = 0; i < p.modalities; ++i) {
    const BackwardModality& own = shared.modality[i];
    int64_t r = p.modality[i].width, n = p.out_len * r;
    for (int64_t item = 0; item < items; ++item)
      for (int64_t q = 0; q < rank; ++q)
        std::memcpy(task.products[i] + (q * items + item) * n,
                    products_of(p, i, first + item) + q * n, n * sizeof(float));
    for (int64_t q = 0; own.needs.up && q < rank; ++q)
      transpose_into(task.products[i] + q * rows * r, r, rows, r,
                     task.transposed[i] + q * r * task.stride, task.stride);
    if (own.needs.products)
      std::memset(task.d_products[i], 0, rank * rows * own.r_stride * sizeof(float));
  }

  const Columns& columns = shared.modality[0].up.columns;
  for (int64_t panel = 0; panel < columns.count; ++panel) {
    int64_t column = columns.first(panel) * kLanes, width = columns.size(panel) * kLanes;
    with_reader(p.out_dtype, p.out_dtype, [&](auto read) {
      for (int64_t row = 0; row < rows; ++row) {
        const char* dy = row_of(p.dy, p.out_dtype, first + row / p.out_len, row % p.out_len);
        for (int64_t j = 0; j < width; j += kLanes)
          store(task.dy + row * width + j, read(dy, column + j, p.dim - column - j));
      }
    });
    for (int64_t q = 0; q < rank; ++q) {
      for (int i = 0; i < p.modalities && p.modalities > 1; ++i) {
        int64_t r = p.modality[i].width;
        multiply<false>(rows, r, task.products[i] + q * rows * r, r,
                        shared.modality[i].up.panel(p.modality[i], q, panel), width, width,
                        task.factors[i], width);
      }
      leave_one_out(p.modalities, rows * width, task);
      for (int i = 0; i < p.modalities; ++i) {
        BackwardModality& own = shared.modality[i];
        int64_t r = p.modality[i].width;
        if (own.needs.up)
          multiply<true>(r, rows, task.transposed[i] + q * r * task.stride, task.stride,
                         task.factors[i], width, width,
                         own.d_up[t].part + r * (q * columns.columns() + column), width);
        if (own.needs.products)
          multiply<true>(rows, least(width, p.dim - column), task.factors[i], width,
                         own.up_transposed + (q * p.dim + column) * own.r_stride, own.r_stride, r,
                         task.d_products[i] + q * rows * own.r_stride, own.r_stride);
      }
    }
  }

  for (int i = 0; i < p.modalities; ++i) {
    BackwardModality& own = shared.modality[i];
    own.d_up[t].advance(rows);
    int64_t n = p.out_len * own.r_stride;
    for (int64_t item = 0; own.needs.products && item < items; ++item)
      for (int64_t q = 0; q < rank; ++q)
        std::memcpy(own.products + ((first + item) * rank + q) * n,
                    task.d_products[i] + (q * items + item) * n, n * sizeof(float));
  }
}

struct UnitTask {
  float *stage, *h, *dz, *transposed, *x_panels, *d_products;
  const char **x, **next, **add;
  char** dx;
  UnitTask(Carver& c, const SequenceFusionBackward& p)
      : stage(c.take<float>(stage_size(p))),
        h(c.take<float>(kMostRows * widest(p) + kLanes)),
        dz(c.take<float>(kMostRows * widest(p) + kLanes)),
        transposed(c.take<float>(widest(p) * kMostRows)),
        x_panels(c.take<float>(largest_unit(p))),
        d_products(c.take<float>(widest(p) * round_up(p.rank() * p.out_len, kLanes))),
        x(c.take<const char*>(kMostRows)),
        next(c.take<const char*>(kMostRows)),
        add(c.take<const char*>(kMostRows)),
        dx(c.take<char*>(kMostRows)) {}

  static int64_t largest_unit(const SequenceFusionBackward& p) {
    int64_t n = 0;
    for (int m = 0; m < p.modalities; ++m) {
      int64_t d = p.modality[m].dim;
      n = greatest(n, unit_rows(d) * round_up(d, kLanes));
    }
    return n;
  }
};

// z of a unit in task.h, as saved or made again.
inline void find_z(const SequenceFusionBackward& p, const BackwardModality& own, const Unit& unit,
                   const UnitTask& task) {
  const Modality& m = p.modality[unit.modality];
  if (!p.z) return project(p, m, own.down, task.x, unit.rows, task.stage, task.h);
  unit.each(m, [&](int64_t item, int64_t row, int64_t n) {
    read_values(z_of(p, unit.modality, item, unit.token), p.dtype, p.dtype, n * m.width,
                task.h + row * m.width);
  });
}

// One panel of dx = dz Wd + add for a block of rows; what the next block writes is fetched.
template <class T, int rows, int vectors>
FASTADAPTERS_INLINE void write_dx_block(int64_t n, int64_t r, int64_t d, const float* dz,
                                        const float* down, int64_t column, char* const* dx,
                                        int64_t next, const char* const* add) {
  const float* a[rows];
  block_of_rows(0, n, [&](int64_t row) { return dz + row * r; }, a);
  for (int64_t l = rows; l < rows + next; ++l)
    prefetch_columns<1, 3>((T*)dx[l] + column, vectors * kLanes);
  Vec sum[rows][vectors];
  sum_products<int32_t>(r, a, down, vectors * kLanes, sum, [](int64_t) {});
  each_vector(sum, n, [&](Vec v, int l, int j) {
    int64_t first = column + j * kLanes;
    if (add[l]) v += load((const T*)add[l] + first, d - first);
    store((T*)dx[l] + first, v, d - first);
  });
}

template <class T>
void write_dx(const Modality& m, const BackwardModality& own, int64_t rows, const UnitTask& task) {
  constexpr int block = kBlockRows<Gemm<Single>::kPanel>;
  const int64_t r = m.width, d = m.dim;
  for (int64_t i = 0; i < rows; i += block)
    for (int64_t panel = 0; panel < own.columns.count; ++panel) {
      int64_t column = own.columns.first(panel) * kLanes;
      with_vectors<Gemm<Single>>(own.columns.size(panel), [&](auto vectors) {
        write_dx_block<T, block, vectors>(
            rows - i, r, d, task.dz + i * r, own.down_rows + r * column, column, task.dx + i,
            greatest(0, least(block, rows - i - block)), task.add + i);
      });
    }
}

// Packs the rows of a unit as the B of dz^T x.
inline void pack_unit(const SequenceFusion& p, const Modality& m, Columns columns, int64_t rows,
                      const char* const* x, float* out) {
  const int64_t d = m.dim;
  with_reader(m.x_dtype, p.dtype, [&](auto read) {
    for (int64_t row = 0; row < rows; ++row) {
      const char* from = x[row];
      for (int64_t panel = 0; panel < columns.count; ++panel) {
        int64_t column = columns.first(panel) * kLanes, width = columns.size(panel) * kLanes;
        float* to = out + rows * column + row * width;
        for (int64_t j = 0; j < width; j += kLanes)
          store(to + j, read(from, column + j, d - column - j));
      }
    }
  });
}

// dWd += dz^T x of a packed unit; the n rows in `next`, of `bytes` each, are fetched meanwhile.
inline void add_down_gradient(int64_t r, int64_t rows, const float* dz, int64_t stride,
                              const float* x, Columns columns, float* sums, const char* const* next,
                              int64_t n, int64_t bytes) {
  int64_t lines = divide_up(bytes, 64), row = 0, line = 0;
  int64_t share = divide_up(n * lines, columns.count * divide_up(r, 8));
  for (int64_t panel = 0; panel < columns.count; ++panel) {
    int64_t column = columns.first(panel) * kLanes, width = columns.size(panel) * kLanes;
    for (int64_t c = 0; c < r; c += 8) {
      for (int64_t left = share; left > 0 && row < n; --left) {
        __builtin_prefetch(next[row] + 64 * line, 0, 2);
        if (++line == lines) line = 0, ++row;
      }
      multiply<true>(least(8, r - c), rows, dz + c * stride, stride, x + rows * column, width,
                     width, sums + r * column + c * width, width);
    }
  }
}

// Everything behind dP, for the tokens of a unit; those of the `next` one are fetched meanwhile.
inline void differentiate_tokens(const SequenceFusionBackward& p, BackwardModality& own, int64_t t,
                                 const Unit& unit, const Unit* next, const UnitTask& task) {
  const Modality& m = p.modality[unit.modality];
  const auto& gradients = p.gradients[unit.modality];
  int64_t r = m.width, products = p.rank() * p.out_len, stride = kMostRows;
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
  if (own.needs.down || own.needs.bias)
    transpose_into(task.dz, r, unit.rows, r, task.transposed, stride);
  for (int64_t c = 0; own.needs.bias && c < r; ++c) {
    Vec total = {};
    for (int64_t i = 0; i < unit.rows; i += kLanes)
      total += read<Vec>(task.transposed + c * stride + i);
    own.d_bias[t].total[c] += sum(total);
  }
  if (own.needs.down) {
    bool follows = next && next->modality == unit.modality;
    if (follows) collect_rows(m, m.x, m.x_dtype, *next, task.next);
    pack_unit(p, m, own.columns, unit.rows, task.x, task.x_panels);
    add_down_gradient(r, unit.rows, task.transposed, stride, task.x_panels, own.columns,
                      own.d_down[t].part, task.next, follows ? next->rows : 0,
                      m.dim * item_size(m.x_dtype));
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
      write_dx<std::remove_pointer_t<decltype(data)>>(m, own, unit.rows, task);
    });
  }
}

// dx of tokens that do not count is 0.
inline void clear_dx(const SequenceFusionBackward& p, int64_t item) {
  for (int i = 0; i < p.modalities; ++i) {
    const Modality& m = p.modality[i];
    for (int64_t token = counted(m, item); p.gradients[i].dx.data && token < m.tokens; ++token)
      std::memset(row_of(p.gradients[i].dx, m.x_dtype, item, token), 0,
                  m.dim * item_size(m.x_dtype));
  }
}

// The sums of all tasks of one modality, in their order, to its gradients.
inline void write_gradients(const SequenceFusionBackward& p, int i, BackwardModality& own) {
  const Modality& m = p.modality[i];
  const auto& out = p.gradients[i];
  auto total = [](std::vector<Sums>& sums) {
    for (Sums& s : sums) s.flush();
    for (size_t t = 1; t < sums.size(); ++t) sums[0].add(sums[t]);
    return sums[0].total;
  };
  if (own.needs.down)
    write_panels(total(own.d_down), m.width, m.dim, own.columns, out.d_down_weight, 0);
  if (own.needs.bias) write_totals(total(own.d_bias), m.width, out.d_down_bias, 0);
  if (own.needs.up) {
    const double* sums = total(own.d_up);
    for (int64_t q = 0; q < p.feature_rank; ++q)
      write_panels(sums + (p.summed ? 0 : q) * m.width * own.up.columns.columns(), m.width, p.dim,
                   own.up.columns, out.d_feature_factor, q * m.width * p.dim);
  }
  if (own.needs.time) {
    const double* sums = total(own.d_time);
    const double zeros[kLanes] = {};
    for (int64_t q = 0; q < p.time_rank; ++q)
      for (int64_t t = 0; t < m.factor_tokens; ++t) {
        int64_t to = (q * m.factor_tokens + t) * p.out_len;
        if (t < m.tokens)
          write_totals(sums + t * own.time_columns + (p.summed ? 0 : q) * p.out_len, p.out_len,
                       out.d_time_factor, to);
        else
          for (int64_t j = 0; j < p.out_len; j += kLanes)
            write_totals(zeros, least(kLanes, p.out_len - j), out.d_time_factor, to + j);
      }
  }
}

inline void backward(const SequenceFusionBackward& p, const Threads& threads) {
  std::vector<Unit> units;
  bool factors = false;
  for (int m = 0; m < p.modalities; ++m) {
    Needs needs(p.gradients[m], p.z);
    factors |= needs.factor;
    if (needs.products) cut(p, m, unit_rows(p.modality[m].dim), units);
  }
  int64_t group = items_at_a_time(p), groups = factors ? divide_up(p.items, group) : 0;
  int64_t unit_tasks = count_tasks(p, threads, int64_t(units.size()));
  int64_t group_tasks = count_tasks(p, threads, groups);
  auto shared = carve<BackwardShared>(shared_scratch(), p, unit_tasks, group_tasks);
  for (int m = 0; m < p.modalities; ++m) shared.modality[m].pack(p, p.modality[m]);

  parallel(threads, group_tasks, [&](int64_t t) {
    auto task = carve<FactorTask>(task_scratch(), p, shared);
    for (auto& modality : shared.modality) modality.d_up[t].clear();
    for (int64_t i = groups * t / group_tasks; i < groups * (t + 1) / group_tasks; ++i) {
      int64_t first = i * group, items = least(group, p.items - first);
      differentiate_products(p, shared, t, first, items, task);
      for (int64_t item = first; item < first + items; ++item) clear_dx(p, item);
    }
  });
  int64_t n = int64_t(units.size());
  parallel(threads, unit_tasks, [&](int64_t t) {
    auto task = carve<UnitTask>(task_scratch(), p);
    for (auto& modality : shared.modality)
      for (auto* sums : {&modality.d_down, &modality.d_time, &modality.d_bias}) (*sums)[t].clear();
    int64_t end = n * (t + 1) / unit_tasks;
    for (int64_t i = n * t / unit_tasks; i < end; ++i)
      differentiate_tokens(p, shared.modality[units[i].modality], t, units[i],
                           i + 1 < end ? &units[i + 1] : nullptr, task);
  });
  parallel(threads, unit_tasks > 1 ? p.modalities : 1, [&](int64_t m) {
    if (unit_tasks > 1) return write_gradients(p, int(m), shared.modality[m]);
    for (int i = 0; i < p.modalities; ++i) write_gradients(p, i, shared.modality[i]);
  });
}

}  // namespace
}  // namespace fastadapters::cpu

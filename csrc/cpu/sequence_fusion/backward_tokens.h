// The second half of backward: from dP to dA, dWd, the bias and dx.
#pragma once

#include "gradients.h"

namespace fastadapters::cpu {
namespace {

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
  constexpr int block = kBlockRows<Columns::kPanel>;
  const int64_t r = m.width, d = m.dim;
  for (int64_t i = 0; i < rows; i += block)
    for (int64_t panel = 0; panel < own.columns.count; ++panel) {
      int64_t column = own.columns.first(panel) * kLanes;
      with_size(own.columns.size(panel), [&](auto vectors) {
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

}  // namespace
}  // namespace fastadapters::cpu

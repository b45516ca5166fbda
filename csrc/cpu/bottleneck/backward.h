// Backward: x, dy and z are read once, dx is written once.
//
//     dh = dy (s Wu)              dz = dh * mask * activation'(z)
//     dx = dz Wd (+ dy)           through the norm: rstd * (v - mean(v) - xhat * mean(xhat * v))
//     g1 = dz^T x   [r, D]        -> dWd, and with Wd the norm's gradients
//     g2 = h^T dy   [r, D]        -> dWu^T, and with Wu the scale's
#pragma once

#include "forward.h"

namespace fastadapters::cpu {
namespace {

// Which intermediate results the gradients asked for need.
struct Needs {
  bool norm, dx, g1, g2, dy_sum, dz, x, z;
  explicit Needs(const BottleneckBackward& p)
      : norm(p.norm_weight.data),
        dx(p.dx.data),
        g1(p.d_down_weight.data || p.d_norm_weight.data),
        g2(p.d_up_weight.data || p.d_scale.data),
        dy_sum(p.d_up_bias.data || p.d_scale.data),
        dz(p.needs_dz()),
        x(p.needs_x()),
        z(p.needs_z()) {}
};

template <class G>
struct BackwardShared {
  int64_t g_rows;
  float *up, *down;                                              // packed weights
  float *down_bias, *up_bias, *scale, *norm_weight, *norm_bias;  // fp32, padded
  float *g1, *g2;                                                // [tasks, panels of g_rows]
  double *dy_sum, *dz_sum;                                       // [tasks, D], [tasks, r]
  double* scale_sum;                                             // [panels]
  BackwardShared(Carver& c, const Sizes<G>& s, const Needs& needs, int64_t tasks)
      : g_rows(round_up(s.r, G::kRows)),
        up(c.take<float>(s.d_words * s.thin.columns(), needs.dz)),
        down(c.take<float>(s.r_words * s.wide.columns(), needs.dx)),
        down_bias(c.take<float>(s.thin.columns())),
        up_bias(c.take<float>(s.wide.columns())),
        scale(c.take<float>(s.wide.columns())),
        norm_weight(c.take<float>(s.wide.columns(), needs.norm)),
        norm_bias(c.take<float>(s.wide.columns(), needs.norm)),
        g1(c.take<float>(tasks * g_rows * s.wide.columns(), needs.g1)),
        g2(c.take<float>(tasks * g_rows * s.wide.columns(), needs.g2)),
        dy_sum(c.take<double>(tasks * s.wide.columns())),
        dz_sum(c.take<double>(tasks * s.thin.columns())),
        scale_sum(c.take<double>(s.wide.count)) {}
};

template <class G>
struct BackwardTask {
  int64_t k_stride;  // of a row of the transposed tiles, in words
  typename G::Store *x, *dy, *dz;
  float *h, *dh, *h_transposed, *dz_transposed, *panel, *mask, *stats;
  float* normal;  // a block of the gradient by xhat
  BackwardTask(Carver& c, const Sizes<G>& s, const Needs& needs)
      : k_stride(round_up(s.words(s.tile_rows), kLanes)),
        x(c.take<typename G::Store>(s.tile_rows * s.d_stride)),
        dy(c.take<typename G::Store>(s.tile_rows * s.d_stride)),
        dz(c.take<typename G::Store>(s.tile_rows * s.r_stride)),
        h(c.take<float>(s.tile_rows * s.thin.columns())),
        dh(c.take<float>(s.tile_rows * s.thin.columns())),
        h_transposed(c.take<float>(s.thin.columns() * k_stride)),
        dz_transposed(c.take<float>(s.thin.columns() * k_stride)),
        panel(c.take<float>(k_stride * G::kPanel * kLanes)),
        mask(c.take<float>(s.thin.columns() + 4)),
        stats(c.take<float>(2 * s.tile_rows)),
        normal(c.take<float>(G::kBlock * s.wide.columns(), needs.norm && needs.dx)) {}
};

// g [r, D] += A^T X for a tile, A^T given as words along m; adds the columns' sums of X to `sums`.
// Either may be null.
template <class G>
inline void accumulate(const Sizes<G>& sizes, int64_t m, const float* transposed, int64_t k_stride,
                       Operand<G> x, float* panel, float* g, double* sums) {
  int64_t words = sizes.words(m), g_rows = round_up(sizes.r, G::kRows);
  for (int64_t p = 0; p < sizes.wide.count; ++p) {
    int64_t first = sizes.wide.first(p) * kLanes;
    with_vectors<G>(sizes.wide.size(p), [&](auto vectors) {
      pack_tile<G, vectors>(x.data, x.ld, m, sizes.d, first, words, panel, sums);
      if (g)
        for (int64_t i = 0; i < g_rows; i += G::kBlock)
          G::template accumulate<vectors>(
              false, g_rows - i, words, (const typename G::Store*)(transposed + i * k_stride),
              k_stride * G::Unit::kPerWord, panel, g + g_rows * first + i * vectors * kLanes,
              vectors * kLanes);
    });
  }
}

// Panel p of every gradient made of g1 and g2, summed over the tasks in their order.
template <class G, class T>
void write_gradients(const BottleneckBackward& p, const Sizes<G>& sizes, const Needs& needs,
                     const BackwardShared<G>& shared, int64_t tasks, int64_t panel) {
  int64_t d = sizes.d, r = sizes.r, columns = sizes.wide.columns();
  int64_t first = sizes.wide.first(panel) * kLanes, width = sizes.wide.size(panel) * kLanes;
  auto reduce = [&](auto* parts, int64_t stride, int64_t offset, int64_t n) {
    for (int64_t t = 1; t < tasks; ++t)
      for (int64_t i = 0; i < n; ++i) parts[offset + i] += parts[t * stride + offset + i];
    return parts + offset;
  };
  int64_t g_size = shared.g_rows * columns, g_offset = shared.g_rows * first;
  float* g1 = needs.g1 ? reduce(shared.g1, g_size, g_offset, shared.g_rows * width) : nullptr;
  float* g2 = needs.g2 ? reduce(shared.g2, g_size, g_offset, shared.g_rows * width) : nullptr;
  const double* dy_sum = reduce(shared.dy_sum, columns, first, width);
  auto write = [](const Parameter& out, int64_t index, Vec v, int64_t n) {
    with_type(out, [&](auto* data) { store(data + index, v, n); });
  };

  Weight<T> down{p.down_weight, r, d}, up{p.up_weight, d, r};
  shared.scale_sum[panel] = 0;
  for (int64_t v = 0; v < width; v += kLanes) {
    int64_t j = first + v, n = d - j;
    Vec norm_weight = needs.norm ? read<Vec>(shared.norm_weight + j) : broadcast(1);
    Vec norm_bias = needs.norm ? read<Vec>(shared.norm_bias + j) : Vec{};
    Vec d_norm_weight = {}, d_norm_bias = {};
    for (int64_t begin = 0; (needs.g1 || p.d_norm_bias.data) && begin < r; begin += 8) {
      Vec weight_part = {}, bias_part = {};
      for (int64_t c = begin; c < least(begin + 8, r); ++c) {
        float dz_sum = float(shared.dz_sum[c]);
        Vec g = needs.g1 ? read<Vec>(g1 + c * width + v) : Vec{};
        Vec by_normal = g * norm_weight;
        if (p.norm_bias.data) by_normal += dz_sum * norm_bias;
        if (p.d_down_weight.data) write(p.d_down_weight, c * d + j, by_normal, n);
        if (needs.norm) {
          weight_part += down(c, j) * g;
          bias_part += down(c, j) * dz_sum;
        }
      }
      d_norm_weight += weight_part;
      d_norm_bias += bias_part;
    }
    if (p.d_norm_weight.data) write(p.d_norm_weight, j, d_norm_weight, n);
    if (p.d_norm_bias.data) write(p.d_norm_bias, j, d_norm_bias, n);

    Vec up_dot[kLanes] = {};  // of each row of g2^T with that of Wu
    if (needs.g2)
      for (int64_t c = 0; c < r; c += kLanes) {
        Vec block[kLanes];
        for (int i = 0; i < kLanes; ++i)
          block[i] = c + i < r ? read<Vec>(g2 + (c + i) * width + v) : Vec{};
        transpose(block);
        for (int64_t i = 0; i < least(kLanes, n); ++i) {
          if (p.d_up_weight.data)
            write(p.d_up_weight, (j + i) * r + c, block[i] * shared.scale[j + i], r - c);
          if (p.d_scale.data) up_dot[i] += block[i] * up(j + i, c);
        }
      }
    Vec total = {}, d_scale = {};
    for (int64_t i = 0; i < least(kLanes, n); ++i) {
      total[i] = float(dy_sum[v + i]);
      d_scale[i] = sum(up_dot[i]);
      if (p.up_bias.data) d_scale[i] += total[i] * shared.up_bias[j + i];
      shared.scale_sum[panel] += d_scale[i];
    }
    if (p.d_up_bias.data) write(p.d_up_bias, j, total * read<Vec>(shared.scale + j), n);
    if (p.d_scale.data && p.channel_scale) write(p.d_scale, j, d_scale, n);
  }
}

// A row of dx as a function of its columns, from the gradient v by xhat and from xhat.
template <class Store>
inline auto through_norm(int64_t d, const float* v, const Store* xhat, float rstd) {
  float mean = sum(sum_columns(d, [&](int64_t j) { return load(v + j, d - j); })) / d;
  auto product = [&](int64_t j) { return load(v + j, d - j) * load(xhat + j, d - j); };
  float slope = sum(sum_columns(d, product)) / d;
  return
      [=](int64_t, int64_t j) { return (read<Vec>(v + j) - mean - slope * load(xhat + j)) * rstd; };
}

template <class G, class T>
void backward(const BottleneckBackward& p, const Threads& threads) {
  Sizes<G> sizes(p);
  Needs needs(p);
  int64_t z_columns = sizes.thin.columns(), columns = sizes.wide.columns();
  int64_t tasks = sizes.tasks(threads.count, 2 * kTileRows);
  auto shared = carve<BackwardShared<G>>(shared_scratch(), sizes, needs, tasks);

  Weight<T> down{p.down_weight, sizes.r, sizes.d}, up{p.up_weight, sizes.d, sizes.r};
  expand<T>(p.down_bias, sizes.r, 0, shared.down_bias);
  expand<T>(p.up_bias, sizes.d, 0, shared.up_bias);
  expand_scale<T>(p, shared.scale);
  up.row_scale = shared.scale;
  if (needs.norm) {
    expand_norm<T>(p, shared.norm_weight, shared.norm_bias);
    down.column_scale = shared.norm_weight;
  }
  if (needs.dz) {
    for (int64_t i = 0; i < sizes.thin.count; ++i)
      pack_rows<G>(up, sizes.thin, i, sizes.d_words, shared.up);
    fold(sizes.thin, sizes.d_words, shared.up);
  }
  if (needs.dx)
    for (int64_t i = 0; i < sizes.wide.count; ++i)
      pack_rows<G>(down, sizes.wide, i, sizes.r_words, shared.down);

  bool stream = needs.dx && streams(p.dx, p.x_dtype, p.all_rows(), sizes.d);
  parallel(threads, tasks, [&](int64_t t) {
    [[maybe_unused]] typename G::Session session;
    auto task = carve<BackwardTask<G>>(task_scratch(), sizes, needs);
    auto clear = [t](auto* part, int64_t n) {
      if (part) std::memset(part += t * n, 0, n * sizeof(*part));
      return part;
    };
    float* g1 = clear(shared.g1, shared.g_rows * columns);
    float* g2 = clear(shared.g2, shared.g_rows * columns);
    double* dy_sum = clear(shared.dy_sum, columns);
    double* dz_sum = clear(shared.dz_sum, z_columns);
    std::memset(task.mask, 0, z_columns * sizeof(float));

    sizes.tiles(p, t, tasks, [&](const TileRows& tile) {
      int64_t m = tile.count;
      Tile<T> x(needs.x ? p.x : Rows{}, p.x_dtype, p.rows, tile, sizes.d);
      Tile<T> dy(p.dy, p.out_dtype, p.rows, tile, sizes.d);
      Tile<T> dx(p.dx, p.x_dtype, p.rows, tile, sizes.d, stream);
      const float* stats = needs.norm && needs.x ? task.stats : nullptr;
      for (int64_t i = 0; stats && i < m; ++i)
        std::memcpy(task.stats + 2 * i, p.stats + 2 * tile[i], 2 * sizeof(float));
      auto dy_operand =
          dy.typed([&](auto* rows) { return operand<G>(rows, dy, m, sizes, task.dy); });
      Operand<G> xhat{};
      if (needs.x)
        xhat = x.typed(
            [&](auto* rows) { return operand<G>(rows, x, m, sizes, task.x, Normalise{stats}); });

      if (needs.dz) {
        std::memset(task.dh, 0, round_up(m, G::kBlock) * z_columns * sizeof(float));
        multiply_long<G>(sizes.chains, m, sizes.d_words, dy_operand.data, dy_operand.ld, shared.up,
                         sizes.thin, task.dh, z_columns);
      }
      bool dz_total = p.d_down_bias.data || (needs.norm && needs.dz);
      for (int64_t i = 0; needs.z && i < m; ++i) {
        if (p.seed) dropout_row(p, tile[i], task.mask);
        for (int64_t c = 0; c < z_columns; c += kLanes) {
          Vec z = load((const T*)p.z + tile[i] * sizes.r + c, sizes.r - c);
          Activated a = activate(p.activation, z);
          Vec mask = p.seed ? read<Vec>(task.mask + c) : broadcast(1);
          store(task.h + i * z_columns + c, a.value * mask);
          if (!needs.dz) continue;
          Vec dh = read<Vec>(task.dh + i * z_columns + c) * mask;
          Vec dz = first_lanes(backpropagate(p.activation, z, a, dh), sizes.r - c);
          store(task.dh + i * z_columns + c, dz);
          store(task.dz + i * sizes.r_stride + c, dz);
        }
        for (int64_t c = z_columns; c < sizes.r_stride; c += kLanes)
          store(task.dz + i * sizes.r_stride + c, Vec{});
      }
      for (int64_t c = 0; dz_total && c < z_columns; c += kLanes)
        for (int64_t begin = 0; begin < m; begin += 8) {
          Vec total = {};
          for (int64_t i = begin; i < least(begin + 8, m); ++i)
            total += read<Vec>(task.dh + i * z_columns + c);
          for (int lane = 0; lane < kLanes; ++lane) dz_sum[c + lane] += total[lane];
        }

      if (needs.dx) {
        Tile<T> add = p.add_dy ? dy : Tile<T>();
        for (int64_t first = 0; first < m; first += G::kBlock) {
          int64_t rows = least(m - first, G::kBlock);
          multiply<G>(
              sizes.chains, rows, sizes.r_words, task.dz + first * sizes.r_stride, sizes.r_stride,
              shared.down, sizes.wide,
              [&](int64_t i, int64_t j) FASTADAPTERS_INLINED {
                i += first;
                dx.expect_write(i, j, G::kPanel * kLanes);
                dy.expect(i + m, j, G::kPanel * kLanes);
                x.expect(i + m, j, G::kPanel * kLanes);
              },
              [&](int64_t row, int64_t n_rows, int64_t column, int64_t n, const float* c) {
                auto value = [&](int64_t i, int64_t j) {
                  return read<Vec>(c + (i - first - row) * G::kPanel * kLanes + j - column);
                };
                if (!needs.norm) return write(dx, add, first + row, n_rows, column, n, value);
                for (int64_t i = row; i < row + n_rows; ++i)
                  for (int64_t j = column; j < column + n; j += kLanes)
                    store(task.normal + i * columns + j, value(first + i, j));
              });
          for (int64_t i = first; needs.norm && i < first + rows; ++i)
            write(dx, add, i, 1, 0, sizes.d,
                  through_norm(sizes.d, task.normal + (i - first) * columns,
                               xhat.data + i * xhat.ld, stats[2 * i + 1]));
        }
      }
      if (needs.g1) {
        pack_transposed<G>(task.dh, m, z_columns, task.dz_transposed, task.k_stride);
        accumulate<G>(sizes, m, task.dz_transposed, task.k_stride, xhat, task.panel, g1, nullptr);
      }
      if (needs.g2) pack_transposed<G>(task.h, m, z_columns, task.h_transposed, task.k_stride);
      if (needs.g2 || needs.dy_sum)
        accumulate<G>(sizes, m, task.h_transposed, task.k_stride, dy_operand, task.panel, g2,
                      dy_sum);
    });
    if (stream) finish_streams();
  });

  for (int64_t t = 1; t < tasks; ++t)
    for (int64_t c = 0; c < z_columns; ++c) shared.dz_sum[c] += shared.dz_sum[t * z_columns + c];
  auto write = [](const Parameter& out, int64_t i, double v) {
    with_type(out, [&](auto* data) { store(data + i, broadcast(float(v)), 1); });
  };
  if (p.d_down_bias.data)
    for (int64_t c = 0; c < sizes.r; ++c) write(p.d_down_bias, c, shared.dz_sum[c]);
  parallel(threads, sizes.wide.count,
           [&](int64_t panel) { write_gradients<G, T>(p, sizes, needs, shared, tasks, panel); });
  if (p.d_scale.data && !p.channel_scale) {
    double total = 0;
    for (int64_t i = 0; i < sizes.wide.count; ++i) total += shared.scale_sum[i];
    write(p.d_scale, 0, total);
  }
}

}  // namespace
}  // namespace fastadapters::cpu

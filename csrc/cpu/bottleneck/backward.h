// Backward: x, dy and z are read once, dx is written once.
//
//     dh = dy (s Wu)                  dz = dh * mask * activation'(z)
//     dx = mask_x * (dz Wd) (+ dy)    by the norm: rstd * (v - mean(v) - xhat * mean(xhat * v))
//     g1 = dz^T (mask_x * x)          [r, D_in] -> dWd, and with Wd the norm's gradients
//     g2 = h^T dy                     [r, D_out] -> dWu^T, and with Wu the scale's
//     g3 = dz^T mask_x                [r, D_in]; without input dropout each row is the sum of dz
#pragma once

#include "gradients.h"

namespace fastadapters::cpu {
namespace {

// A task sums over no more rows, tile by tile: rounding errors grow with the length of the chain.
constexpr int64_t kSummedRows = 32768;

template <class G>
struct BackwardTask {
  int64_t k_stride;  // of a row of the transposed tiles, in words
  typename G::Store *x, *dy, *dz;
  float *h, *dh, *h_transposed, *dz_transposed, *panel, *stats;
  float* normal;  // a block of the gradient by xhat, or a few rows of dz Wd
  int8_t *x_kept, *h_kept;
  BackwardTask(Carver& c, const Sizes<G>& s, const Needs& needs, const Masks& masks)
      : k_stride(round_up(s.thin.as_words(s.tile_rows), kLanes)),
        x(c.take<typename G::Store>(s.tile_rows * s.in.stride)),
        dy(c.take<typename G::Store>(s.tile_rows * s.out.stride)),
        dz(c.take<typename G::Store>(s.tile_rows * s.thin.stride)),
        h(c.take<float>(s.tile_rows * s.thin.columns())),
        dh(c.take<float>(s.tile_rows * s.thin.columns())),
        h_transposed(c.take<float>(s.thin.columns() * k_stride)),
        dz_transposed(c.take<float>(s.thin.columns() * k_stride)),
        panel(c.take<float>(k_stride * G::kPanel * kLanes)),
        stats(c.take<float>(2 * s.tile_rows)),
        normal(c.take<float>((s.few ? s.tile_rows : G::kBlock) * s.in.columns(),
                             needs.dx && (needs.norm || s.few))),
        x_kept(c.take<int8_t>(s.tile_rows * s.in.mask_stride(), needs.x_mask)),
        h_kept(c.take<int8_t>(s.thin.mask_stride(), masks.h.on)) {}
};

// g [r, D] += A^T X for a tile, A^T given as words along m; adds the columns' sums of X to `sums`.
// Either may be null.
template <class G>
inline void accumulate(const Width<G>& width, int64_t r, int64_t m, const float* transposed,
                       int64_t k_stride, Operand<G> x, float* panel, float* g, double* sums) {
  int64_t words = width.as_words(m), g_rows = round_up(r, G::kRows);
  for (int64_t p = 0; p < width.panels.count; ++p) {
    int64_t first = width.panels.first(p) * kLanes;
    with_constant<G::kPanel>(width.panels.size(p), [&](auto vectors) {
      auto add = [&](int64_t i, const auto& b) FASTADAPTERS_INLINED {
        G::template accumulate<vectors>(
            g_rows - i, words, (const typename G::Store*)(transposed + i * k_stride),
            k_stride * G::Unit::kPerWord, b, g + g_rows * first + i * vectors * kLanes,
            vectors * kLanes);
      };
      int64_t i = 0;
      if constexpr (G::kPacksOnTheWay)
        if (g && m == words * G::Unit::kPerWord && first + vectors * kLanes <= width.size) {
          add(i, PackOnTheWay<G, vectors>{x.data + first, x.ld, panel});
          i += G::kBlock;
        }
      if (i == 0) pack_tile<G, vectors>(x.data, x.ld, m, width.size, first, words, panel);
      for (; g && i < g_rows; i += G::kBlock) add(i, panel);
      if (sums) add_columns<G, vectors>(panel, words, sums + first);
    });
  }
}

// x as it is masked: 1 where it is kept.
template <class Store>
inline void mask_rows(Store* x, int64_t m, int64_t d, int64_t ld, TileMask mask) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < d; j += kLanes)
      store(x + i * ld + j, load(x + i * ld + j) * mask(i, j));
}

// A row of dx as a function of its columns, from the gradient v by xhat and from xhat.
template <class Store>
inline auto through_norm(int64_t d, const float* v, const Store* xhat, float rstd) {
  float mean = sum(sum_columns(d, [&](int64_t j) { return load(v + j, d - j); })) / d;
  auto product = [&](int64_t j) { return load(v + j, d - j) * load(xhat + j, d - j); };
  float slope = sum(sum_columns(d, product)) / d;
  return [=](int64_t j) { return (read<Vec>(v + j) - mean - slope * load(xhat + j)) * rstd; };
}

template <class G, class T>
void backward(const BottleneckBackward& p, const Threads& threads) {
  Sizes<G> sizes(p);
  const Width<G>&in = sizes.in, &out = sizes.out, &thin = sizes.thin;
  const Masks masks(p);
  const Needs needs(p, masks);
  const bool norm = needs.norm;
  int64_t z_columns = thin.columns();
  int64_t tasks = sizes.tasks(threads.count, 2 * kTileRows);
  tasks *= greatest(1, divide_up(sizes.m, tasks * kSummedRows));
  auto shared = carve<BackwardShared<G>>(shared_scratch(), sizes, needs, tasks);

  Weight<T> down{p.down_weight, thin.size, in.size}, up{p.up_weight, out.size, thin.size};
  expand<T>(p.down_bias, thin.size, 0, shared.down_bias);
  expand<T>(p.up_bias, out.size, 0, shared.up_bias);
  expand_scale<T>(p, shared.scale);
  up.row_scale = shared.scale;
  if (needs.norm) {
    expand_norm<T>(p, shared.norm_weight, shared.norm_bias);
    down.column_scale = shared.norm_weight;
  }
  if (needs.dz && !sizes.few) {
    for (int64_t i = 0; i < thin.panels.count; ++i)
      pack_rows<G>(up, thin.panels, i, out.words, shared.up);
    fold<G>(thin.panels, out.words, shared.up);
  }
  if (needs.dx && !sizes.few)
    for (int64_t i = 0; i < in.panels.count; ++i)
      pack_rows<G>(down, in.panels, i, thin.words, shared.down);

  FewRows<G> few;
  parallel(threads, tasks, [&](int64_t t) {
    [[maybe_unused]] typename G::Session session;
    auto task = carve<BackwardTask<G>>(task_scratch(), sizes, needs, masks);
    auto clear = [t](auto* part, int64_t n) {
      if (part) std::memset(part += t * n, 0, n * sizeof(*part));
      return part;
    };
    float* g1 = clear(shared.g1, shared.g_rows * in.columns());
    float* g2 = clear(shared.g2, shared.g_rows * out.columns());
    float* g3 = clear(shared.g3, shared.g_rows * in.columns());
    double* dy_sum = clear(shared.dy_sum, out.columns());
    double* dz_sum = clear(shared.dz_sum, z_columns);

    sizes.tiles(p, t, tasks, [&](const TileRows& tile) {
      int64_t m = tile.count;
      Tile<T> x(needs.x ? p.x : Rows{}, p.x_dtype, p.rows, tile, in.size);
      Tile<T> dy(p.dy, p.out_dtype, p.rows, tile, out.size);
      Tile<T> dx(p.dx, p.x_dtype, p.rows, tile, in.size);
      TileMask mask;
      if (needs.x_mask) mask = tile_mask(masks.x, tile, in, task.x_kept, 1);
      const float* stats = needs.norm && needs.x ? task.stats : nullptr;
      for (int64_t i = 0; stats && i < m; ++i)
        std::memcpy(task.stats + 2 * i, p.stats + 2 * tile[i], 2 * sizeof(float));
      auto dy_operand = dy.typed([&](auto* rows) { return operand<G>(rows, dy, m, out, task.dy); });
      Operand<G> xhat{};
      if (needs.x)
        xhat = x.typed([&](auto* rows) {
          return operand<G>(rows, x, m, in, task.x, Normalise{stats},
                            needs.norm ? TileMask{} : mask);
        });

      if (needs.dz && sizes.few) {
        multiply_stored(m, dy_operand.data, dy_operand.ld, up, task.dh, z_columns);
      } else if (needs.dz) {
        std::memset(task.dh, 0, round_up(m, G::kBlock) * z_columns * sizeof(float));
        multiply_long<G>(sizes.chain, m, out.words, dy_operand.data, dy_operand.ld, shared.up,
                         thin.panels, task.dh, z_columns);
      }
      bool dz_total = p.d_down_bias.data || (needs.norm && needs.dz);
      for (int64_t i = 0; needs.z && i < m; ++i) {
        if (masks.h.on) masks.h.row(tile[i], thin.size, task.h_kept);
        for (int64_t c = 0; c < z_columns; c += kLanes) {
          Vec z = load((const T*)p.z + tile[i] * thin.size + c, thin.size - c);
          Activated a = activate(p.activation, z);
          Vec factor = masks.h.on ? where_kept(task.h_kept + c, masks.h.factor) : broadcast(1);
          store(task.h + i * z_columns + c, a.value * factor);
          if (!needs.dz) continue;
          Vec dh = read<Vec>(task.dh + i * z_columns + c) * factor;
          Vec dz = first_lanes(backpropagate(p.activation, z, a, dh), thin.size - c);
          store(task.dh + i * z_columns + c, dz);
          store(task.dz + i * thin.stride + c, dz);
        }
        for (int64_t c = z_columns; c < thin.stride; c += kLanes)
          store(task.dz + i * thin.stride + c, Vec{});
      }
      for (int64_t c = 0; dz_total && c < z_columns; c += kLanes)
        for (int64_t begin = 0; begin < m; begin += 8) {
          Vec total = {};
          for (int64_t i = begin; i < least(begin + 8, m); ++i)
            total += read<Vec>(task.dh + i * z_columns + c);
          for (int lane = 0; lane < kLanes; ++lane) dz_sum[c + lane] += total[lane];
        }

      if (needs.dx)
        dx.typed([&](auto* data) {
          Tile<T> add = p.add_dy ? dy : Tile<T>();
          int64_t block = sizes.few ? m : G::kBlock;
          for (int64_t first = 0; first < m; first += block) {
            int64_t rows = least(m - first, block);
            auto finish = [&](auto vectors, int64_t begin, int64_t column) FASTADAPTERS_INLINED {
              return [=, &mask, &masks, &task, &dx, &add, &in](
                         int64_t i, const Vec(&v)[vectors]) FASTADAPTERS_INLINED {
                i += begin;
                auto masked = [&](int j) FASTADAPTERS_INLINED {
                  if (!mask.kept) return v[j];
                  return v[j] * (mask(first + i, column + j * kLanes) * masks.x.factor);
                };
                float* normal = task.normal + i * in.columns() + column;
                if (norm)
                  for (int j = 0; j < vectors; ++j) store(normal + j * kLanes, masked(j));
                else
                  RowWriter(data, dx, add, first + i, column).template panel<vectors>(masked);
              };
            };
            if (sizes.few) {
              multiply_stored(m, task.dh, z_columns, down, task.normal, in.columns());
              finish_stored(m, task.normal, in.columns(), in.columns(), finish);
            } else {
              multiply<G>(
                  rows, thin.words, task.dz + first * thin.stride, thin.stride, shared.down,
                  in.panels,
                  [&](int64_t i, int64_t n, int64_t j) FASTADAPTERS_INLINED {
                    i += first;
                    dx.expect_write(i, n, j, G::kPanel * kLanes);
                    if (j < out.size) dy.expect(i + m, n, j, G::kPanel * kLanes);
                    x.expect(i + m, n, j, G::kPanel * kLanes);
                  },
                  finish);
            }
            for (int64_t i = first; norm && i < first + rows; ++i) {
              auto value = through_norm(in.size, task.normal + (i - first) * in.columns(),
                                        xhat.data + i * xhat.ld, stats[2 * i + 1]);
              RowWriter row(data, dx, add, i, 0);
              for (int64_t j = 0; j < in.size; j += kLanes) row.put(j, value(j));
            }
          }
        });
      if (needs.g1 && needs.norm && mask.kept) mask_rows(task.x, m, in.size, in.stride, mask);
      if (sizes.few) {
        few = {m, xhat, dy_operand, task.dh, task.h, mask};
        return;
      }
      if (needs.g1 || needs.g3)
        pack_transposed<G>(task.dh, m, z_columns, task.dz_transposed, task.k_stride);
      auto add_to = [&](float* g, Operand<G> rows) {
        accumulate<G>(in, thin.size, m, task.dz_transposed, task.k_stride, rows, task.panel, g,
                      nullptr);
      };
      if (needs.g1) add_to(g1, xhat);
      if (needs.g3) {
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < in.size; j += kLanes)
            store(task.x + i * in.stride + j, mask(i, j));
        add_to(g3, {task.x, in.stride});
      }
      if (needs.g2) pack_transposed<G>(task.h, m, z_columns, task.h_transposed, task.k_stride);
      if (needs.g2 || needs.dy_sum)
        accumulate<G>(out, thin.size, m, task.h_transposed, task.k_stride, dy_operand, task.panel,
                      g2, dy_sum);
    });
  });

  for (int64_t t = 1; t < tasks; ++t)
    for (int64_t c = 0; c < z_columns; ++c) shared.dz_sum[c] += shared.dz_sum[t * z_columns + c];
  auto write = [](const Parameter& out, int64_t i, double v) {
    with_type(out, [&](auto* data) { store(data + i, broadcast(float(v)), 1); });
  };
  if (p.d_down_bias.data)
    for (int64_t c = 0; c < thin.size; ++c) write(p.d_down_bias, c, shared.dz_sum[c]);
  // Panel by panel; a few rows' without any.
  int64_t downs = sizes.few ? 1 : in.panels.count, ups = sizes.few ? 1 : out.panels.count;
  bool worthwhile = thin.size * (in.size + out.size) >> 16;
  parallel(worthwhile ? threads : Threads{}, downs + ups, [&](int64_t i) {
    if (sizes.few && i < downs)
      write_down_gradients_of_few<G, T>(p, sizes, needs, shared, few, masks.x.factor);
    else if (sizes.few)
      write_up_gradients_of_few<G, T>(p, sizes, needs, shared, few);
    else if (i < downs)
      write_down_gradients<G, T>(p, sizes, needs, shared, tasks, masks.x.factor, i);
    else
      write_up_gradients<G, T>(p, sizes, needs, shared, tasks, i - downs);
  });
  if (p.d_scale.data && !p.channel_scale) {
    double total = 0;
    for (int64_t i = 0; i < ups; ++i) total += shared.scale_sum[i];
    write(p.d_scale, 0, total);
  }
}

}  // namespace
}  // namespace fastadapters::cpu

// Forward: x is read once, y is written once.
#pragma once

#include "../tile.h"

namespace fastadapters::cpu {
namespace {

template <class G>
struct ForwardShared {
  float *down, *up;                                              // packed weights
  float *down_bias, *up_bias, *scale, *norm_weight, *norm_bias;  // fp32, padded
  ForwardShared(Carver& c, const Sizes<G>& s, bool norm)
      : down(c.take<float>(s.d_words * s.thin.columns())),
        up(c.take<float>(s.r_words * s.wide.columns())),
        down_bias(c.take<float>(s.thin.columns())),
        up_bias(c.take<float>(s.wide.columns())),
        scale(c.take<float>(s.wide.columns())),
        norm_weight(c.take<float>(s.wide.columns(), norm)),
        norm_bias(c.take<float>(s.wide.columns(), norm)) {}
};

template <class G>
struct ForwardTask {
  typename G::Store *x, *h;
  float *z, *stats, *mask;
  ForwardTask(Carver& c, const Sizes<G>& s)
      : x(c.take<typename G::Store>(s.tile_rows * s.d_stride)),
        h(c.take<typename G::Store>(s.tile_rows * s.r_stride)),
        z(c.take<float>(s.tile_rows * s.thin.columns())),
        stats(c.take<float>(2 * s.tile_rows)),
        mask(c.take<float>(s.thin.columns() + 4)) {}
};

// s, a number or a parameter, as a vector of D.
template <class T>
inline void expand_scale(const Bottleneck& p, float* scale) {
  float value = p.scale_value;
  if (p.scale.data && !p.channel_scale) value = Weight<T>{p.scale, 1, 1}(0, 0)[0];
  expand<T>(p.channel_scale ? p.scale : Parameter{}, p.dim, value, scale);
}

// The norm's parameters have x's dtype.
template <class T>
inline void expand_norm(const Bottleneck& p, float* weight, float* bias) {
  auto expand_as = [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    expand<X>(p.norm_weight, p.dim, 1, weight);
    expand<X>(p.norm_bias, p.dim, 0, bias);
  };
  p.x_dtype == Dtype::float32 ? expand_as((float*)nullptr) : expand_as((T*)nullptr);
}

template <class G, class T>
void forward(const BottleneckForward& p, const Threads& threads) {
  Sizes<G> sizes(p);
  if (sizes.m == 0) return;
  bool norm = p.norm_weight.data;
  auto shared = carve<ForwardShared<G>>(shared_scratch(), sizes, norm);

  Weight<T> down{p.down_weight, sizes.r, sizes.d}, up{p.up_weight, sizes.d, sizes.r};
  expand<T>(p.down_bias, sizes.r, 0, shared.down_bias);
  expand<T>(p.up_bias, sizes.d, 0, shared.up_bias);
  expand_scale<T>(p, shared.scale);
  for (int64_t j = 0; j < sizes.d; j += kLanes)
    store(shared.up_bias + j, read<Vec>(shared.up_bias + j) * read<Vec>(shared.scale + j));
  if (norm) expand_norm<T>(p, shared.norm_weight, shared.norm_bias);
  for (int64_t i = 0; i < sizes.thin.count; ++i)
    pack_columns<G>(down, sizes.thin, i, sizes.d_words, shared.down);
  fold(sizes.thin, sizes.d_words, shared.down);
  for (int64_t i = 0; i < sizes.wide.count; ++i)
    pack_columns<G>(up, sizes.wide, i, sizes.r_words, shared.up);

  bool stream = streams(p.y, p.out_dtype, p.all_rows(), sizes.d);
  int64_t tasks = sizes.tasks(threads.count, G::kBlock);
  parallel(threads, tasks, [&](int64_t t) {
    [[maybe_unused]] typename G::Session session;
    auto task = carve<ForwardTask<G>>(task_scratch(), sizes);
    int64_t z_columns = sizes.thin.columns();
    std::memset(task.mask, 0, z_columns * sizeof(float));

    sizes.tiles(p, t, tasks, [&](const TileRows& tile) {
      int64_t m = tile.count;
      Tile<T> x(p.x, p.x_dtype, p.rows, tile, sizes.d);
      Tile<T> residual(p.residual, p.out_dtype, p.rows, tile, sizes.d);
      Tile<T> y(p.y, p.out_dtype, p.rows, tile, sizes.d, stream);
      auto a = x.typed([&](auto* rows) {
        for (int64_t i = 0; norm && i < m; ++i)
          row_statistics(rows + x.offset(i), sizes.d, p.norm_eps, task.stats + 2 * i);
        return operand<G>(
            rows, x, m, sizes, task.x,
            norm ? Normalise{task.stats, shared.norm_weight, shared.norm_bias} : Normalise{});
      });
      for (int64_t i = 0; norm && p.stats && i < m; ++i)
        std::memcpy(p.stats + 2 * tile[i], task.stats + 2 * i, 2 * sizeof(float));
      std::memset(task.z, 0, round_up(m, G::kBlock) * z_columns * sizeof(float));
      multiply_long<G>(sizes.chains, m, sizes.d_words, a.data, a.ld, shared.down, sizes.thin,
                       task.z, z_columns);

      for (int64_t i = 0; i < m; ++i) {
        if (p.seed) dropout_row(p, tile[i], task.mask);
        for (int64_t c = 0; c < sizes.r_stride; c += kLanes) {
          Vec h = {};
          if (c < sizes.r) {
            Vec z = read<Vec>(task.z + i * z_columns + c) + read<Vec>(shared.down_bias + c);
            if (p.z) store((T*)p.z + tile[i] * sizes.r + c, z, sizes.r - c);
            h = activate(p.activation, z).value;
            if (p.seed) h *= read<Vec>(task.mask + c);
            h = first_lanes(h, sizes.r - c);
          }
          store(task.h + i * sizes.r_stride + c, h);
        }
      }

      multiply<G>(
          sizes.chains, m, sizes.r_words, task.h, sizes.r_stride, shared.up, sizes.wide,
          [&](int64_t i, int64_t j) FASTADAPTERS_INLINED {
            y.expect_write(i, j, G::kPanel * kLanes);
            x.expect(i + m, j, G::kPanel * kLanes);
          },
          [&](int64_t first, int64_t rows, int64_t column, int64_t n, const float* c) {
            write(y, residual, first, rows, column, n, [&](int64_t i, int64_t j) {
              Vec v = read<Vec>(c + (i - first) * G::kPanel * kLanes + j - column);
              return v * read<Vec>(shared.scale + j) + read<Vec>(shared.up_bias + j);
            });
          });
    });
    if (stream) finish_streams();
  });
}

}  // namespace
}  // namespace fastadapters::cpu

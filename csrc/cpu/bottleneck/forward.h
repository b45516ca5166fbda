// Forward: x is read once, y is written once.
#pragma once

#include "../tile.h"

namespace fastadapters::cpu {
namespace {

// What x, behind LayerNorm, and h are multiplied with.
struct Masks {
  Dropout x, h;
  explicit Masks(const Bottleneck& p) : x(p.seed, p.input_dropout, 1), h(p.seed, p.dropout, 0) {}
};

template <class G>
struct ForwardShared {
  float *down, *up;                                              // packed weights
  float *down_bias, *up_bias, *scale, *norm_weight, *norm_bias;  // fp32, padded
  ForwardShared(Carver& c, const Sizes<G>& s, bool norm)
      : down(c.take<float>(s.in.words * s.thin.columns(), !s.few)),
        up(c.take<float>(s.thin.words * s.out.columns(), !s.few)),
        down_bias(c.take<float>(s.thin.columns())),
        up_bias(c.take<float>(s.out.columns())),
        scale(c.take<float>(s.out.columns())),
        norm_weight(c.take<float>(s.in.columns(), norm)),
        norm_bias(c.take<float>(s.in.columns(), norm)) {}
};

template <class G>
struct ForwardTask {
  typename G::Store *x, *h;
  float *z, *u, *stats;
  int8_t *x_kept, *h_kept;
  ForwardTask(Carver& c, const Sizes<G>& s, const Masks& masks)
      : x(c.take<typename G::Store>(s.tile_rows * s.in.stride)),
        h(c.take<typename G::Store>(s.tile_rows * s.thin.stride)),
        z(c.take<float>(s.tile_rows * s.thin.columns())),
        u(c.take<float>(s.tile_rows * s.out.columns(), s.few)),
        stats(c.take<float>(2 * s.tile_rows)),
        x_kept(c.take<int8_t>(s.tile_rows * s.in.mask_stride(), masks.x.on)),
        h_kept(c.take<int8_t>(s.thin.mask_stride(), masks.h.on)) {}
};

// s, a number or a parameter, as a vector of D_out.
template <class T>
inline void expand_scale(const Bottleneck& p, float* scale) {
  float value = p.scale_value;
  if (p.scale.data && !p.channel_scale) value = Weight<T>{p.scale, 1, 1}(0, 0)[0];
  expand<T>(p.channel_scale ? p.scale : Parameter{}, p.out_dim, value, scale);
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

// A vector of parameters, as many columns of it as a panel has, in registers.
template <int vectors>
struct Columns {
  Vec of[vectors];
  explicit FASTADAPTERS_INLINE Columns(const float* p) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) of[j] = read<Vec>(p + j * kLanes);
  }
};

template <class G, class T>
void forward(const BottleneckForward& p, const Threads& threads) {
  Sizes<G> sizes(p);
  if (sizes.m == 0) return;
  bool norm = p.norm_weight.data;
  const Width<G>&in = sizes.in, &out = sizes.out, &thin = sizes.thin;
  const Masks masks(p);
  auto shared = carve<ForwardShared<G>>(shared_scratch(), sizes, norm);

  Weight<T> down{p.down_weight, thin.size, in.size}, up{p.up_weight, out.size, thin.size};
  expand<T>(p.down_bias, thin.size, 0, shared.down_bias);
  expand<T>(p.up_bias, out.size, 0, shared.up_bias);
  expand_scale<T>(p, shared.scale);
  for (int64_t j = 0; j < out.size; j += kLanes)
    store(shared.up_bias + j, read<Vec>(shared.up_bias + j) * read<Vec>(shared.scale + j));
  if (norm) expand_norm<T>(p, shared.norm_weight, shared.norm_bias);
  if (!sizes.few) {
    for (int64_t i = 0; i < thin.panels.count; ++i)
      pack_columns<G>(down, thin.panels, i, in.words, shared.down);
    fold<G>(thin.panels, in.words, shared.down);
    for (int64_t i = 0; i < out.panels.count; ++i)
      pack_columns<G>(up, out.panels, i, thin.words, shared.up);
  }

  int64_t tasks = sizes.tasks(threads.count, G::kBlock);
  parallel(threads, tasks, [&](int64_t t) {
    [[maybe_unused]] typename G::Session session;
    auto task = carve<ForwardTask<G>>(task_scratch(), sizes, masks);
    int64_t z_columns = thin.columns();

    sizes.tiles(p, t, tasks, [&](const TileRows& tile) {
      int64_t m = tile.count;
      Tile<T> x(p.x, p.x_dtype, p.rows, tile, in.size);
      Tile<T> residual(p.residual, p.out_dtype, p.rows, tile, out.size);
      Tile<T> y(p.y, p.out_dtype, p.rows, tile, out.size);
      TileMask mask = tile_mask(masks.x, tile, in, task.x_kept, masks.x.factor);
      auto a = x.typed([&](auto* rows) {
        for (int64_t i = 0; norm && i < m; ++i)
          row_statistics(rows + x.offset(i), in.size, p.norm_eps, task.stats + 2 * i);
        return operand<G>(
            rows, x, m, in, task.x,
            norm ? Normalise{task.stats, shared.norm_weight, shared.norm_bias} : Normalise{}, mask);
      });
      for (int64_t i = 0; norm && p.stats && i < m; ++i)
        std::memcpy(p.stats + 2 * tile[i], task.stats + 2 * i, 2 * sizeof(float));
      if (sizes.few) {
        multiply_stored_transposed(m, a.data, a.ld, down, task.z, z_columns);
      } else {
        std::memset(task.z, 0, round_up(m, G::kBlock) * z_columns * sizeof(float));
        multiply_long<G>(sizes.chain, m, in.words, a.data, a.ld, shared.down, thin.panels, task.z,
                         z_columns);
      }

      for (int64_t i = 0; i < m; ++i) {
        if (masks.h.on) masks.h.row(tile[i], thin.size, task.h_kept);
        for (int64_t c = 0; c < thin.stride; c += kLanes) {
          Vec h = {};
          if (c < thin.size) {
            Vec z = read<Vec>(task.z + i * z_columns + c) + read<Vec>(shared.down_bias + c);
            if (p.z) store((T*)p.z + tile[i] * thin.size + c, z, thin.size - c);
            h = activate(p.activation, z).value;
            if (masks.h.on) h *= where_kept(task.h_kept + c, masks.h.factor);
            h = first_lanes(h, thin.size - c);
          }
          store(task.h + i * thin.stride + c, h);
        }
      }

      y.typed([&](auto* data) {
        auto finish = [&](auto vectors, int64_t first, int64_t column) FASTADAPTERS_INLINED {
          Columns<vectors> scale(shared.scale + column), shift(shared.up_bias + column);
          return [=, &y, &residual](int64_t i, const Vec(&v)[vectors]) FASTADAPTERS_INLINED {
            RowWriter row(data, y, residual, first + i, column);
            row.template panel<vectors>(
                [&](int j) FASTADAPTERS_INLINED { return v[j] * scale.of[j] + shift.of[j]; });
          };
        };
        if (sizes.few) {
          multiply_stored_transposed(m, task.h, thin.stride, up, task.u, out.columns());
          return finish_stored(m, task.u, out.columns(), out.columns(), finish);
        }
        multiply<G>(
            m, thin.words, task.h, thin.stride, shared.up, out.panels,
            [&](int64_t i, int64_t rows, int64_t j) FASTADAPTERS_INLINED {
              y.expect_write(i, rows, j, G::kPanel * kLanes);
              if (j < in.size) x.expect(i + m, rows, j, G::kPanel * kLanes);
            },
            finish);
      });
    });
  });
}

}  // namespace
}  // namespace fastadapters::cpu

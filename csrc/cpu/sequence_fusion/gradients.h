// What the two halves of backward share.
#pragma once

#include "operands.h"
#include "sums.h"

namespace fastadapters::cpu {
namespace {

// Rows that go together through everything behind dP: their x stays in the second-level
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
      d_down.emplace_back(c, narrow() ? m.width * columns.columns() : m.dim * r_stride, needs.down);
      d_time.emplace_back(c, m.tokens * time_columns, needs.time);
      d_bias.emplace_back(c, m.width, needs.bias);
    }
    for (int64_t t = 0; t < result_tasks; ++t)
      d_up.emplace_back(c, p.rank() * m.width * up.columns.columns(), needs.up);
  }

  // Whether dWd is summed as [r, D], not transposed.
  bool narrow() const { return down.columns.narrow; }

  template <class Words>
  void pack(const SequenceFusionBackward& p, const Modality& m) {
    if (!p.z && needs.products) down.pack<Words>(m);
    up.pack(p, m);
    const float* features = up.factors.get();
    for (int64_t q = 0; needs.products && q < p.rank(); ++q)
      transpose_into(features + q * m.width * p.dim, p.dim, m.width, p.dim,
                     up_transposed + q * p.dim * r_stride, r_stride);
    if (needs.dx) cpu::pack<Words>(down.weights.get(), m.width, columns, m.dim, down_rows);
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

}  // namespace
}  // namespace fastadapters::cpu

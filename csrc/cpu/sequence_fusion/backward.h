// Backward: x and dy are read once, dx is written once.
//
//     F_m = P_mq U_mq                    G_m = dy times the F of all other modalities
//     dU_mq = P_mq^T G_m                 dP_mq = G_m U_mq^T
//     dH_m = sum_q A_mq dP_mq            dA_mq = H_m dP_mq^T
//     dz = dH activation'(z)             dWd = dz^T x, dx = dz Wd (+ dy)
#pragma once

#include "backward_products.h"
#include "backward_tokens.h"
#include "forward.h"

namespace fastadapters::cpu {
namespace {

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
  if (own.needs.down) {
    const double* sums = total(own.d_down);
    if (!own.narrow())
      write_transposed(sums, own.r_stride, m.width, m.dim, out.d_down_weight);
    else
      for (int64_t j = 0; j < m.width; ++j)
        write_totals(sums + j * own.columns.columns(), m.dim, out.d_down_weight, j * m.dim);
  }
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

template <class Words>
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
  for (int m = 0; m < p.modalities; ++m) shared.modality[m].pack<Words>(p, p.modality[m]);

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
    auto task = carve<UnitTask<Words>>(task_scratch(), p);
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

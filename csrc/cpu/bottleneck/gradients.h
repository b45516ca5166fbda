// The gradients of the parameters, made of g1, g2 and g3 of backward.h.
#pragma once

#include "forward.h"

namespace fastadapters::cpu {
namespace {

// Which intermediate results the gradients asked for need.
struct Needs {
  bool norm, dx, g1, g2, dy_sum, dz, x, z, x_mask, g3;
  Needs(const BottleneckBackward& p, const Masks& masks)
      : norm(p.norm_weight.data),
        dx(p.dx.data),
        g1(p.d_down_weight.data || p.d_norm_weight.data),
        g2(p.d_up_weight.data || p.d_scale.data),
        dy_sum(p.d_up_bias.data || p.d_scale.data),
        dz(p.needs_dz()),
        x(p.needs_x()),
        z(p.needs_z()),
        x_mask(masks.x.on && (dx || g1 || p.d_norm_bias.data)),
        g3(x_mask && norm && (p.d_norm_bias.data || (g1 && p.norm_bias.data))) {}
};

template <class G>
struct BackwardShared {
  int64_t g_rows;
  float *up, *down;                                              // packed weights
  float *down_bias, *up_bias, *scale, *norm_weight, *norm_bias;  // fp32, padded
  float *g1, *g2, *g3;                                           // [tasks, panels of g_rows]
  double *dy_sum, *dz_sum;                                       // [tasks, D_out], [tasks, r]
  double* scale_sum;                                             // [panels]
  float* few;                                                    // a row of g2 of few rows
  BackwardShared(Carver& c, const Sizes<G>& s, const Needs& needs, int64_t tasks)
      : g_rows(round_up(s.thin.size, G::kRows)),
        up(c.take<float>(s.out.words * s.thin.columns(), needs.dz && !s.few)),
        down(c.take<float>(s.thin.words * s.in.columns(), needs.dx && !s.few)),
        down_bias(c.take<float>(s.thin.columns())),
        up_bias(c.take<float>(s.out.columns())),
        scale(c.take<float>(s.out.columns())),
        norm_weight(c.take<float>(s.in.columns(), needs.norm)),
        norm_bias(c.take<float>(s.in.columns(), needs.norm)),
        g1(c.take<float>(tasks * g_rows * s.in.columns(), needs.g1 && !s.few)),
        g2(c.take<float>(tasks * g_rows * s.out.columns(), needs.g2 && !s.few)),
        g3(c.take<float>(tasks * g_rows * s.in.columns(), needs.g3 && !s.few)),
        dy_sum(c.take<double>(tasks * s.out.columns(), !s.few)),
        dz_sum(c.take<double>(tasks * s.thin.columns())),
        scale_sum(c.take<double>(s.out.panels.count)),
        few(c.take<float>(s.thin.columns(), s.few)) {}
};

// The sum of the tasks' parts, in their order, in the place of the first.
template <class T>
inline T* reduce(T* parts, int64_t tasks, int64_t stride, int64_t offset, int64_t n) {
  if (!parts) return nullptr;
  for (int64_t t = 1; t < tasks; ++t)
    for (int64_t i = 0; i < n; ++i) parts[offset + i] += parts[t * stride + offset + i];
  return parts + offset;
}

inline void write_gradient(const Parameter& out, int64_t index, Vec v, int64_t n) {
  if (out.data) with_type(out, [&](auto* data) { store(data + index, v, n); });
}

// Panel p of the gradients made of g1 and g3: by the down-projection and by the norm.
template <class G, class T>
void write_down_gradients(const BottleneckBackward& p, const Sizes<G>& sizes, const Needs& needs,
                          const BackwardShared<G>& shared, int64_t tasks, float kept,
                          int64_t panel) {
  const Width<G>& in = sizes.in;
  int64_t r = sizes.thin.size, size = shared.g_rows * in.columns();
  int64_t first = in.panels.first(panel) * kLanes, width = in.panels.size(panel) * kLanes;
  float* g1 = reduce(shared.g1, tasks, size, shared.g_rows * first, shared.g_rows * width);
  float* g3 = reduce(shared.g3, tasks, size, shared.g_rows * first, shared.g_rows * width);
  Weight<T> down{p.down_weight, r, in.size};
  for (int64_t v = 0; v < width; v += kLanes) {
    int64_t j = first + v, n = in.size - j;
    Vec norm_weight = needs.norm ? read<Vec>(shared.norm_weight + j) : broadcast(1);
    Vec norm_bias = needs.norm ? read<Vec>(shared.norm_bias + j) : Vec{};
    Vec d_norm_weight = {}, d_norm_bias = {};
    for (int64_t begin = 0; (needs.g1 || p.d_norm_bias.data) && begin < r; begin += 8) {
      Vec weight_part = {}, bias_part = {};
      for (int64_t c = begin; c < least(begin + 8, r); ++c) {
        Vec g = needs.g1 ? read<Vec>(g1 + c * width + v) : Vec{};
        Vec dz_sum = broadcast(float(shared.dz_sum[c]));
        if (needs.x_mask) g *= kept;
        if (g3) dz_sum = read<Vec>(g3 + c * width + v) * kept;
        Vec by_normal = g * norm_weight;
        if (p.norm_bias.data) by_normal += dz_sum * norm_bias;
        write_gradient(p.d_down_weight, c * in.size + j, by_normal, n);
        if (needs.norm) {
          weight_part += down(c, j) * g;
          bias_part += down(c, j) * dz_sum;
        }
      }
      d_norm_weight += weight_part;
      d_norm_bias += bias_part;
    }
    write_gradient(p.d_norm_weight, j, d_norm_weight, n);
    write_gradient(p.d_norm_bias, j, d_norm_bias, n);
  }
}

// Panel p of the gradients made of g2: by the up-projection and by the scale.
template <class G, class T>
void write_up_gradients(const BottleneckBackward& p, const Sizes<G>& sizes, const Needs& needs,
                        const BackwardShared<G>& shared, int64_t tasks, int64_t panel) {
  const Width<G>& out = sizes.out;
  int64_t r = sizes.thin.size, size = shared.g_rows * out.columns();
  int64_t first = out.panels.first(panel) * kLanes, width = out.panels.size(panel) * kLanes;
  float* g2 = reduce(shared.g2, tasks, size, shared.g_rows * first, shared.g_rows * width);
  const double* dy_sum = reduce(shared.dy_sum, tasks, out.columns(), first, width);
  Weight<T> up{p.up_weight, out.size, r};
  shared.scale_sum[panel] = 0;
  for (int64_t v = 0; v < width; v += kLanes) {
    int64_t j = first + v, n = out.size - j;
    Vec up_dot[kLanes] = {};  // of each row of g2^T with that of Wu
    if (needs.g2)
      for (int64_t c = 0; c < r; c += kLanes) {
        Vec block[kLanes];
        for (int i = 0; i < kLanes; ++i)
          block[i] = c + i < r ? read<Vec>(g2 + (c + i) * width + v) : Vec{};
        transpose(block);
        for (int64_t i = 0; i < least(kLanes, n); ++i) {
          write_gradient(p.d_up_weight, (j + i) * r + c, block[i] * shared.scale[j + i], r - c);
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
    write_gradient(p.d_up_bias, j, total * read<Vec>(shared.scale + j), n);
    if (p.channel_scale) write_gradient(p.d_scale, j, d_scale, n);
  }
}

// What a few rows have for the gradients of the parameters.
template <class G>
struct FewRows {
  int64_t m = 0;
  Operand<G> x{}, dy{};  // x normalised and masked
  const float *dz = nullptr, *h = nullptr;
  TileMask mask;  // of x
};

// Where they belong; by the down-projection and by the norm. Panel by panel of the columns, of
// which x is copied: see with_panel.
template <class G, class T>
void write_down_gradients_of_few(const BottleneckBackward& p, const Sizes<G>& sizes,
                                 const Needs& needs, const BackwardShared<G>& shared,
                                 const FewRows<G>& few, float kept) {
  if (!needs.g1 && !p.d_norm_bias.data) return;
  constexpr int64_t width = kFewVectors * kLanes;
  const int64_t d = sizes.in.size, r = sizes.thin.size;
  // Without a norm and a mask in front, and in fp32, G is the gradient.
  const bool in_place =
      !needs.norm && !needs.x_mask && p.d_down_weight.dtype == Dtype::float32 && d % kLanes == 0;
  float* out = (float*)p.d_down_weight.data;
  if (in_place && few.m == 1) {
    for (int64_t c = 0; c < r; ++c)
      sum_rows<typename G::Store>(1, few.dz + c, few.x.data, few.x.ld, d, out + c * d);
    return;
  }
  Weight<T> down{p.down_weight, r, d};
  alignas(64) float x[kFewRows * width], row[width];
  for (int64_t first = 0; first < d; first += width) {
    int64_t n = least(width, d - first), vectors = divide_up(n, kLanes);
    for (int64_t i = 0; needs.g1 && i < few.m; ++i)
      for (int64_t j = 0; j < n; j += kLanes)
        store(x + i * width + j, load(few.x.data + i * few.x.ld + first + j, n - j));
    Vec sums[2][kFewVectors] = {}, parts[2][kFewVectors] = {};  // of the norm's gradients
    for (int64_t c = 0; c < r; ++c) {
      float dz[kFewRows];
      for (int64_t i = 0; i < few.m; ++i) dz[i] = few.dz[i * sizes.thin.columns() + c];
      if (in_place) {
        if (c + 4 < r) prefetch_columns<1, 3>(out + (c + 4) * d + first, n);
        sum_rows<float>(few.m, dz, x, width, n, out + c * d + first);
        continue;
      }
      if (needs.g1) sum_rows<float>(few.m, dz, x, width, n, row);
      for (int64_t v = 0; v < vectors; ++v) {
        int64_t j = first + v * kLanes;
        Vec g = needs.g1 ? read<Vec>(row + v * kLanes) : Vec{};
        if (needs.x_mask) g *= kept;
        if (needs.norm) {
          Vec dz_sum = broadcast(float(shared.dz_sum[c]));
          if (needs.g3) {
            dz_sum = Vec{};
            for (int64_t i = 0; i < few.m; ++i) dz_sum += dz[i] * kept * few.mask(i, j);
          }
          Vec weight = down(c, j);
          parts[0][v] += weight * g;
          parts[1][v] += weight * dz_sum;
          g *= read<Vec>(shared.norm_weight + j);
          if (p.norm_bias.data) g += dz_sum * read<Vec>(shared.norm_bias + j);
        }
        write_gradient(p.d_down_weight, c * d + j, g, d - j);
      }
      if (needs.norm && (c % 8 == 7 || c + 1 == r))
        for (int of = 0; of < 2; ++of)
          for (int64_t v = 0; v < vectors; ++v) {
            sums[of][v] += parts[of][v];
            parts[of][v] = Vec{};
          }
    }
    for (int64_t v = 0; v < vectors; ++v) {
      int64_t j = first + v * kLanes;
      write_gradient(p.d_norm_weight, j, sums[0][v], d - j);
      write_gradient(p.d_norm_bias, j, sums[1][v], d - j);
    }
  }
}

// By the up-projection and by the scale, row by row.
template <class G, class T>
void write_up_gradients_of_few(const BottleneckBackward& p, const Sizes<G>& sizes,
                               const Needs& needs, const BackwardShared<G>& shared,
                               const FewRows<G>& few) {
  shared.scale_sum[0] = 0;
  if (!needs.g2 && !needs.dy_sum) return;
  const int64_t d = sizes.out.size, r = sizes.thin.size, columns = sizes.thin.columns();
  const bool in_place = !p.d_scale.data && p.d_up_weight.dtype == Dtype::float32 && r % kLanes == 0;
  float* row = shared.few;
  Weight<T> up{p.up_weight, d, r};
  for (int64_t first = 0; first < d; first += kLanes) {
    float dy[kFewRows][kLanes];
    Vec total = {}, d_scale = {}, scale = read<Vec>(shared.scale + first);
    for (int64_t i = 0; i < few.m; ++i) {
      Vec v = load(few.dy.data + i * few.dy.ld + first, d - first);
      total += v;
      store(dy[i], in_place ? v * scale : v);
    }
    for (int64_t l = 0, j = first; needs.g2 && l < least(kLanes, d - first); ++l, ++j) {
      float factors[kFewRows];
      for (int64_t i = 0; i < few.m; ++i) factors[i] = dy[i][l];
      float* to = in_place ? (float*)p.d_up_weight.data + j * r : row;
      sum_rows<float>(few.m, factors, few.h, columns, r, to);
      if (in_place) continue;
      Vec dot = {};
      for (int64_t c = 0; c < r; c += kLanes) {
        Vec g = read<Vec>(row + c);
        write_gradient(p.d_up_weight, j * r + c, g * shared.scale[j], r - c);
        if (p.d_scale.data) dot += g * up(j, c);
      }
      d_scale[l] = sum(dot);
    }
    if (p.up_bias.data) d_scale += total * read<Vec>(shared.up_bias + first);
    for (int64_t l = 0; l < least(kLanes, d - first); ++l) shared.scale_sum[0] += d_scale[l];
    write_gradient(p.d_up_bias, first, total * scale, d - first);
    if (p.channel_scale) write_gradient(p.d_scale, first, d_scale, d - first);
  }
}

}  // namespace
}  // namespace fastadapters::cpu

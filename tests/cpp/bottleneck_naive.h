// Samples of the bottleneck, and its definition in naive loops.
#pragma once

#include <cmath>
#include <vector>

#include "activations.h"
#include "arrays.h"
#include "bottleneck.h"
#include "philox.h"

namespace fastadapters {
namespace {

enum class Residual { none, self, other };
enum class Scale { number, learnable, channel };

struct Case {
  int64_t rows[3];
  int64_t dim, bottleneck;
  Activation activation;
  Residual residual;
  Scale scale;
  bool bias, norm, norm_bias;
  double dropout;
  int64_t gap = 0;                // between rows, in elements
  bool broadcast_dy = false;      // one row of dy for all, by strides of 0
  bool float_parameters = false;  // float32 parameters whatever the dtype of the products
  bool float_x = false;           // float32 x and dx
  bool float_y = false;           // float32 y, dy and residual
  int64_t out_dim = 0;            // D_out where it is not `dim`
  double input_dropout = 0;

  int64_t out() const { return out_dim ? out_dim : dim; }

  template <class T, class V>
  Case with(T Case::* field, V value) const {
    Case changed = *this;
    changed.*field = value;
    return changed;
  }
};

constexpr auto kIdentity = Activation::identity;
constexpr auto kRelu = Activation::relu;
constexpr auto kGelu = Activation::gelu;
constexpr auto kTanh = Activation::gelu_tanh;
constexpr auto kSilu = Activation::silu;
constexpr auto kQuick = Activation::quick_gelu;
constexpr auto kNone = Residual::none;
constexpr auto kSelf = Residual::self;
constexpr auto kOther = Residual::other;
constexpr auto kNumber = Scale::number;
constexpr auto kLearnable = Scale::learnable;
constexpr auto kChannel = Scale::channel;

const Case kCases[] = {
    Case{{1, 1, 0}, 8, 4, kRelu, kSelf, kChannel, true, true, true, 0.5},
    Case{{1, 1, 1}, 1, 1, kIdentity, kNone, kNumber, false, false, false, 0},
    Case{{1, 1, 1}, 100, 33, kGelu, kSelf, kLearnable, true, true, true, 0.3},
    Case{{1, 1, 7}, 10, 10, kRelu, kOther, kChannel, true, false, false, 0}.with(&Case::gap, 3),
    Case{{3, 5, 7}, 100, 10, kTanh, kSelf, kChannel, true, true, false, 0.1}.with(&Case::gap, 5),
    Case{{1, 2, 67}, 64, 48, kSilu, kOther, kLearnable, false, false, false, 0.9}
        .with(&Case::gap, 1)
        .with(&Case::broadcast_dy, true),
    Case{{1, 1, 65}, 768, 64, kRelu, kSelf, kNumber, true, false, false, 0},
    Case{{1, 1, 197}, 192, 8, kGelu, kSelf, kNumber, true, true, true, 0}.with(
        &Case::float_parameters, true),
    Case{{2, 1, 99}, 257, 1, kQuick, kNone, kChannel, true, true, true, 0.5}.with(&Case::gap, 2),
    Case{{1, 1, 33}, 1024, 256, kGelu, kOther, kLearnable, true, false, false, 0.2}.with(
        &Case::broadcast_dy, true),
    Case{{1, 1, 40}, 31, 100, kIdentity, kSelf, kNumber, false, false, false, 1.0},
    Case{{1, 3, 23}, 96, 20, kGelu, kSelf, kNumber, true, true, true, 0.1}
        .with(&Case::float_parameters, true)
        .with(&Case::float_x, true)
        .with(&Case::float_y, true),
    Case{{1, 1, 70}, 65, 17, kRelu, kNone, kChannel, true, false, false, 0}
        .with(&Case::gap, 3)
        .with(&Case::broadcast_dy, true)
        .with(&Case::float_parameters, true)
        .with(&Case::float_x, true),
    Case{{1, 1, 20}, 72, 16, kIdentity, kOther, kNumber, false, false, false, 0}
        .with(&Case::gap, 1)
        .with(&Case::out_dim, 154)
        .with(&Case::input_dropout, 0.05),
    Case{{2, 1, 25}, 70, 33, kGelu, kOther, kLearnable, true, true, true, 0.25}
        .with(&Case::gap, 2)
        .with(&Case::out_dim, 41)
        .with(&Case::input_dropout, 0.3),
    Case{{2, 3, 2}, 100, 20, kGelu, kNone, kChannel, true, true, true, 0.25}
        .with(&Case::gap, 3)
        .with(&Case::out_dim, 41)
        .with(&Case::input_dropout, 0.3),
    Case{{1, 1, 16}, 65, 4, kSilu, kOther, kLearnable, true, false, false, 0}
        .with(&Case::broadcast_dy, true)
        .with(&Case::float_parameters, true)
        .with(&Case::float_x, true)
        .with(&Case::out_dim, 130)
        .with(&Case::input_dropout, 0.5),
    Case{{1, 1, 3}, 64, 16, kSilu, kOther, kLearnable, true, true, false, 0}.with(&Case::float_y,
                                                                                  true),
};

constexpr int kOutputs = 9;
constexpr const char* kNames[kOutputs] = {
    "y",           "dx",        "d_down_weight", "d_down_bias",
    "d_up_weight", "d_up_bias", "d_norm_weight", "d_norm_bias",
    "d_scale"};

struct Inputs {
  Values x, residual, dy, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, scale;
  double scale_value = 0.7, norm_eps = 1e-5;
  int64_t seed[2] = {0x123456789abcdef, 0x7fedcba987654321};
};

struct Exact {
  double round(double v) const { return v; }
  double add(double a, double b) const { return a + b; }
};

// What PyTorch does in a dtype: results are rounded to it, sums are kept in float32.
struct Rounded {
  const Format& format;
  double round(double v) const { return nearest(v, format); }
  double add(double a, double b) const { return float(a + b); }
};

// Forward and backward by the definition.
template <class Arithmetic>
std::vector<Values> naive(const Case& c, const Inputs& in, const Arithmetic& math) {
  const int64_t m = c.rows[0] * c.rows[1] * c.rows[2], d = c.dim, n = c.out(), r = c.bottleneck;
  auto zeros = [](int64_t n) { return Values(size_t(n), 0.0); };
  std::vector<Values> out = {zeros(m * n), zeros(m * d), zeros(r * d),
                             zeros(r),     zeros(n * r), zeros(n),
                             zeros(d),     zeros(d),     zeros(c.scale == Scale::channel ? n : 1)};
  Values &y = out[0], &dx = out[1], &d_down = out[2], &d_down_bias = out[3], &d_up = out[4];
  Values &d_up_bias = out[5], &d_norm = out[6], &d_norm_bias = out[7], &d_scale = out[8];
  // What an element of a row of `columns` is multiplied with.
  auto dropped = [&](double p, uint64_t stream, int64_t row, int64_t columns, int64_t i) {
    if (p == 0) return 1.0;
    PhiloxBlock block =
        philox4x32(uint64_t(in.seed[0]), uint64_t(row * ((columns + 3) / 4) + i / 4),
                   uint64_t(in.seed[1]) + stream);
    bool gone = p == 1 || block.lane[i % 4] < dropout_threshold(p);
    return gone ? 0.0 : 1 / (1 - p);
  };

  for (int64_t row = 0; row < m; ++row) {
    const double* x = &in.x[size_t(row * d)];
    const double* dy = &in.dy[size_t(row * n)];
    Values normal(x, x + d), hat(x, x + d), h(static_cast<size_t>(r)), slope(h), dz(h),
        dnormal(normal), mask_x(normal);
    double rstd = 1;
    if (c.norm) {
      double mean = 0, variance = 0;
      for (int64_t i = 0; i < d; ++i) mean = math.add(mean, x[i] / double(d));
      for (int64_t i = 0; i < d; ++i)
        variance = math.add(variance, (x[i] - mean) * (x[i] - mean) / double(d));
      rstd = 1 / std::sqrt(variance + in.norm_eps);
      for (int64_t i = 0; i < d; ++i) {
        hat[i] = (x[i] - mean) * rstd;
        normal[i] = math.round(hat[i] * in.norm_weight[i] + (c.norm_bias ? in.norm_bias[i] : 0));
      }
    }
    for (int64_t i = 0; i < d; ++i) {
      mask_x[i] = dropped(c.input_dropout, 1, row, d, i);
      normal[i] = math.round(normal[i] * mask_x[i]);
    }
    for (int64_t j = 0; j < r; ++j) {
      double z = c.bias ? in.down_bias[j] : 0;
      for (int64_t i = 0; i < d; ++i) z = math.add(z, normal[i] * in.down_weight[j * d + i]);
      auto [value, derivative] = activate(c.activation, math.round(z));
      double mask = dropped(c.dropout, 0, row, r, j);
      h[j] = math.round(math.round(value) * mask);
      slope[j] = derivative * mask;
    }
    Values du(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
      double u = c.bias ? in.up_bias[i] : 0;
      for (int64_t j = 0; j < r; ++j) u = math.add(u, h[j] * in.up_weight[i * r + j]);
      u = math.round(u);
      double s =
          c.scale == Scale::number ? in.scale_value : in.scale[c.scale == Scale::channel ? i : 0];
      double residual = c.residual == Residual::none   ? 0
                        : c.residual == Residual::self ? x[i]
                                                       : in.residual[size_t(row * n + i)];
      y[size_t(row * n + i)] = math.round(residual + math.round(s * u));
      du[i] = math.round(s * dy[i]);
      double& ds = d_scale[c.scale == Scale::channel ? i : 0];
      ds = math.add(ds, math.round(dy[i] * u));
      d_up_bias[i] = math.add(d_up_bias[i], du[i]);
      for (int64_t j = 0; j < r; ++j) d_up[i * r + j] = math.add(d_up[i * r + j], du[i] * h[j]);
    }
    for (int64_t j = 0; j < r; ++j) {
      double dh = 0;
      for (int64_t i = 0; i < n; ++i) dh = math.add(dh, du[i] * in.up_weight[i * r + j]);
      dz[j] = math.round(math.round(dh) * slope[j]);
      d_down_bias[j] = math.add(d_down_bias[j], dz[j]);
      for (int64_t i = 0; i < d; ++i)
        d_down[j * d + i] = math.add(d_down[j * d + i], dz[j] * normal[i]);
    }
    double mean = 0, projection = 0;
    for (int64_t i = 0; i < d; ++i) {
      double g = 0;
      for (int64_t j = 0; j < r; ++j) g = math.add(g, dz[j] * in.down_weight[j * d + i]);
      dnormal[i] = g = math.round(math.round(g) * mask_x[i]);
      if (!c.norm) continue;
      d_norm[i] = math.add(d_norm[i], g * hat[i]);
      d_norm_bias[i] = math.add(d_norm_bias[i], g);
      mean = math.add(mean, g * in.norm_weight[i] / double(d));
      projection = math.add(projection, g * in.norm_weight[i] * hat[i] / double(d));
    }
    for (int64_t i = 0; i < d; ++i) {
      double g =
          c.norm ? math.round(rstd * (dnormal[i] * in.norm_weight[i] - mean - hat[i] * projection))
                 : dnormal[i];
      dx[size_t(row * d + i)] = math.round(g + (c.residual == Residual::self ? dy[i] : 0));
    }
  }
  for (Values& values : out)
    for (double& v : values) v = math.round(v);
  return out;
}

}  // namespace
}  // namespace fastadapters

// Samples of sequence fusion, and its definition in naive loops.
#pragma once

#include <cmath>
#include <vector>

#include "activations.h"
#include "arrays.h"
#include "sequence_fusion.h"

namespace fastadapters {
namespace {

struct Sample {
  std::vector<int64_t> tokens, dims;  // of each modality
  int64_t items, width, out_len, dim, time_rank, feature_rank;
  bool summed, bias, leading, residual;
  Activation activation;
  bool lengths = false;
  int64_t gap = 0;                // between rows, in elements
  int64_t spare = 0;              // rows of A beyond the tokens
  bool float_storage = false;     // float32 x, y and dy whatever the dtype of the products
  bool float_parameters = false;  // the same of the parameters

  int64_t modalities() const { return int64_t(tokens.size()); }
  int64_t rank() const { return summed ? 1 : time_rank; }
};

const Sample kSamples[] = {
    {{1}, {1}, 1, 1, 1, 1, 1, 1, false, false, false, false, Activation::identity},
    {{11, 40, 7}, {32, 31, 5}, 3, 8, 8, 33, 3, 3, false, true, false, true, Activation::gelu},
    {{9, 140},
     {50, 50},
     2,
     33,
     12,
     50,
     2,
     3,
     true,
     true,
     true,
     false,
     Activation::gelu_tanh,
     true,
     3,
     2},
    {{1, 3}, {17, 6}, 70, 4, 1, 20, 2, 2, false, true, false, false, Activation::relu, true},
    {{5, 3, 9, 4, 6, 2, 7, 1},
     {16, 16, 16, 16, 16, 16, 16, 16},
     4,
     3,
     10,
     16,
     1,
     1,
     false,
     false,
     true,
     false,
     Activation::silu,
     false,
     1,
     0,
     true,
     true},
    {{70}, {100}, 2, 60, 40, 100, 1, 1, false, true, true, false, Activation::quick_gelu, true},
};

struct Data {
  std::vector<Values> x, down, bias, time, feature;
  Values residual, dy;
  std::vector<std::vector<int64_t>> lengths;
};

// As PyTorch, results of products in a dtype are rounded to it; Exact rounds nothing.
struct Round {
  const Format* format;  // null for exact
  double operator()(double v) const { return format ? nearest(v, *format) : v; }
};

// y, then for each kind of gradient (dx, d_down, d_bias, d_time, d_feature) those of all
// modalities.
inline std::vector<Values> naive(const Sample& s, const Data& in, Round round) {
  const int64_t m = s.modalities(), b = s.items, r = s.width, o = s.out_len, d = s.dim;
  const int64_t rank = s.rank();
  auto zeros = [](int64_t n) { return Values(size_t(n), 0.0); };
  std::vector<Values> out(size_t(1 + 5 * m));
  auto gradient = [&](int64_t kind, int64_t i) -> Values& { return out[size_t(1 + kind * m + i)]; };
  out[0] = zeros(b * o * d);
  std::vector<Values> time, feature, z, h, p, f, df, dp, dtime, dfeature;
  for (int64_t i = 0; i < m; ++i) {
    int64_t t = s.tokens[size_t(i)], all = t + s.spare, width = s.dims[size_t(i)];
    gradient(0, i) = zeros(b * t * width);
    gradient(1, i) = zeros(r * width);
    gradient(2, i) = zeros(r);
    gradient(3, i) = zeros(s.time_rank * all * o);
    gradient(4, i) = zeros(s.feature_rank * r * d);
    auto factor = [&](const Values& given, int64_t ranks, int64_t n) {
      Values sum = zeros(rank * n);
      for (int64_t q = 0; q < ranks; ++q)
        for (int64_t j = 0; j < n; ++j)
          sum[size_t((s.summed ? 0 : q) * n + j)] += given[size_t(q * n + j)];
      for (double& v : sum) v = round(v);
      return sum;
    };
    time.push_back(factor(in.time[size_t(i)], s.time_rank, all * o));
    feature.push_back(factor(in.feature[size_t(i)], s.feature_rank, r * d));
    z.push_back(zeros(b * t * r));
    h.push_back(zeros(b * t * r));
    p.push_back(zeros(b * rank * o * r));
    f.push_back(zeros(b * rank * o * d));
    df.push_back(zeros(b * rank * o * d));
    dp.push_back(zeros(b * rank * o * r));
    dtime.push_back(zeros(rank * all * o));
    dfeature.push_back(zeros(rank * r * d));
    for (int64_t item = 0; item < b; ++item) {
      for (int64_t token = 0; token < in.lengths[size_t(i)][size_t(item)]; ++token)
        for (int64_t c = 0; c < r; ++c) {
          double sum = s.bias ? in.bias[size_t(i)][size_t(c)] : 0;
          for (int64_t j = 0; j < width; ++j)
            sum += in.x[size_t(i)][size_t((item * t + token) * width + j)] *
                   in.down[size_t(i)][size_t(c * width + j)];
          double& value = z[size_t(i)][size_t((item * t + token) * r + c)];
          value = round(sum);
          double activated = round(activate(s.activation, value).first);
          h[size_t(i)][size_t((item * t + token) * r + c)] = activated;
          for (int64_t q = 0; q < rank; ++q)
            for (int64_t k = 0; k < o; ++k)
              p[size_t(i)][size_t(((item * rank + q) * o + k) * r + c)] +=
                  time[size_t(i)][size_t((q * all + token) * o + k)] * activated;
        }
      for (int64_t row = item * rank * o; row < (item + 1) * rank * o; ++row)
        for (int64_t j = 0; j < d; ++j) {
          double sum = 0;
          for (int64_t c = 0; c < r; ++c)
            sum += round(p[size_t(i)][size_t(row * r + c)]) *
                   feature[size_t(i)][size_t((row / o % rank * r + c) * d + j)];
          f[size_t(i)][size_t(row * d + j)] = round(sum);
        }
    }
  }
  for (int64_t item = 0; item < b; ++item) {
    for (int64_t k = 0; k < o; ++k)
      for (int64_t j = 0; j < d; ++j) {
        size_t at = size_t((item * o + k) * d + j);
        double sum = 0;
        for (int64_t q = 0; q < rank; ++q) {
          size_t of_rank = size_t(((item * rank + q) * o + k) * d + j);
          double product = 1;
          for (int64_t i = 0; i < m; ++i) product = round(product * f[size_t(i)][of_rank]);
          sum = round(sum + product);
          for (int64_t i = 0; i < m; ++i) {
            double others = in.dy[at];
            for (int64_t n = 0; n < m; ++n)
              if (n != i) others = round(others * f[size_t(n)][of_rank]);
            df[size_t(i)][of_rank] = others;
          }
        }
        out[0][at] = sum + (s.residual ? in.residual[at] : 0);
      }
    for (int64_t i = 0, row = 0; s.leading && i < m; ++i)
      for (int64_t token = 0; token < in.lengths[size_t(i)][size_t(item)] && row < o;
           ++token, ++row)
        for (int64_t j = 0; j < d; ++j) {
          size_t of_x = size_t((item * s.tokens[size_t(i)] + token) * d + j);
          size_t of_y = size_t((item * o + row) * d + j);
          out[0][of_y] += in.x[size_t(i)][of_x];
          gradient(0, i)[of_x] += in.dy[of_y];
        }
  }
  for (int64_t i = 0; i < m; ++i) {
    int64_t t = s.tokens[size_t(i)], all = t + s.spare, width = s.dims[size_t(i)];
    for (int64_t row = 0; row < b * rank * o; ++row)
      for (int64_t c = 0; c < r; ++c) {
        double sum = 0;
        size_t of_factor = size_t((row / o % rank * r + c) * d);
        for (int64_t j = 0; j < d; ++j) {
          double g = df[size_t(i)][size_t(row * d + j)];
          sum += g * feature[size_t(i)][of_factor + size_t(j)];
          dfeature[size_t(i)][of_factor + size_t(j)] +=
              g * round(p[size_t(i)][size_t(row * r + c)]);
        }
        dp[size_t(i)][size_t(row * r + c)] = round(sum);
      }
    for (int64_t item = 0; item < b; ++item)
      for (int64_t token = 0; token < in.lengths[size_t(i)][size_t(item)]; ++token)
        for (int64_t c = 0; c < r; ++c) {
          size_t of_z = size_t((item * t + token) * r + c);
          double dh = 0;
          for (int64_t q = 0; q < rank; ++q)
            for (int64_t k = 0; k < o; ++k) {
              double of_p = dp[size_t(i)][size_t(((item * rank + q) * o + k) * r + c)];
              size_t of_time = size_t((q * all + token) * o + k);
              dh += time[size_t(i)][of_time] * of_p;
              dtime[size_t(i)][of_time] += h[size_t(i)][of_z] * of_p;
            }
          double dz = round(round(dh) * activate(s.activation, z[size_t(i)][of_z]).second);
          gradient(2, i)[size_t(c)] += dz;
          for (int64_t j = 0; j < width; ++j) {
            size_t of_x = size_t((item * t + token) * width + j);
            gradient(0, i)[of_x] += dz * in.down[size_t(i)][size_t(c * width + j)];
            gradient(1, i)[size_t(c * width + j)] += dz * in.x[size_t(i)][of_x];
          }
        }
    auto spread = [&](const Values& sum, Values& to, int64_t ranks, int64_t n) {
      for (int64_t q = 0; q < ranks; ++q)
        for (int64_t j = 0; j < n; ++j)
          to[size_t(q * n + j)] = sum[size_t((s.summed ? 0 : q) * n + j)];
    };
    spread(dtime[size_t(i)], gradient(3, i), s.time_rank, all * o);
    spread(dfeature[size_t(i)], gradient(4, i), s.feature_rank, r * d);
  }
  for (Values& values : out)
    for (double& v : values) v = round(v);
  return out;
}

}  // namespace
}  // namespace fastadapters

// Arguments of the bottleneck op on raw pointers, shared by the CPU and the CUDA backend.
//
//     z = input_dropout(norm(x)) Wd^T + bd    [M, r]
//     h = dropout(activation(z))              [M, r]
//     y = residual + s * (h Wu^T + bu)        [M, D_out]
#pragma once

#include <array>

#include "tensors.h"

namespace fastadapters {

struct Bottleneck {
  // `dtype` is that of the products, z and h. x, and what has the dtype of the result (residual, y,
  // dy), have the same or are in fp32; dx has x's.
  Dtype dtype = Dtype::float32, x_dtype = Dtype::float32, out_dtype = Dtype::float32;
  int64_t rows[3] = {1, 1, 0};  // M = rows[0] * rows[1] * rows[2]
  // The rows that the call is about, ascending; all M where it is null. z, stats and dropout go by
  // a row's place among all M.
  const int64_t* order = nullptr;
  int64_t ordered = 0;
  int64_t dim = 0;         // D_in: of x, dx, the norm and Wd
  int64_t out_dim = 0;     // D_out: of residual, y, dy, Wu, bu and a scale per channel
  int64_t bottleneck = 0;  // r
  Rows x;                  // in backward absent where nothing asked for needs its values
  Parameter down_weight;   // [r, D_in]
  Parameter down_bias;     // [r]
  Parameter up_weight;     // [D_out, r]
  Parameter up_bias;       // [D_out]
  Parameter norm_weight;   // [D_in]; LayerNorm in front iff present
  Parameter norm_bias;     // [D_in]
  Parameter scale;         // [1] or [D_out]; scale_value if absent
  bool channel_scale = false;
  float scale_value = 1;
  float norm_eps = 1e-5f;
  Activation activation = Activation::relu;
  // [2]: key and offset of the Philox stream, which is there if either probability is above 0. The
  // mask of x is made of offset + 1, as that of h is: see philox.h.
  const int64_t* seed = nullptr;
  double dropout = 0, input_dropout = 0;
  // [M, r], contiguous: what forward keeps for backward. In the CUDA kernels' h, where that tells
  // the derivative of the activation as well (identity, relu).
  void* z = nullptr;
  // [M, 2] mean and reciprocal standard deviation of each row of x; in the CUDA kernels' with a
  // minus where all elements of a 16-bit row are equal
  float* stats = nullptr;

  int64_t all_rows() const { return rows[0] * rows[1] * rows[2]; }
  int64_t count() const { return order ? ordered : all_rows(); }
};

struct BottleneckForward : Bottleneck {
  Rows residual;
  Rows y;
};

struct BottleneckBackward : Bottleneck {
  Rows dy;
  bool add_dy = false;  // dx += dy: the residual is x itself
  Rows dx;
  Parameter d_down_weight;
  Parameter d_down_bias;
  Parameter d_up_weight;
  Parameter d_up_bias;
  Parameter d_norm_weight;
  Parameter d_norm_bias;
  Parameter d_scale;

  // What the gradients asked for are made of.
  bool needs_dz() const {
    return dx.data || d_down_weight.data || d_down_bias.data || d_norm_weight.data ||
           d_norm_bias.data;
  }
  bool needs_z() const { return needs_dz() || d_up_weight.data || d_scale.data; }
  // On GPUs there is no z where there is LayerNorm: it is made of x once more.
  bool needs_x() const {
    return d_down_weight.data || d_norm_weight.data || (norm_weight.data && dx.data);
  }
};

// The parameters in the order of the schemas, their gradients, and how many elements one adapter
// has of each.
struct ParameterKind {
  Parameter Bottleneck::* parameter;
  Parameter BottleneckBackward::* gradient;
  const char *name, *gradient_name;
  int64_t size;
};

inline std::array<ParameterKind, 7> parameter_kinds(const Bottleneck& p) {
  using P = Bottleneck;
  using B = BottleneckBackward;
  int64_t d = p.dim, out = p.out_dim, r = p.bottleneck, scales = p.channel_scale ? out : 1;
  return {{
      {&P::down_weight, &B::d_down_weight, "down_weight", "d_down_weight", r * d},
      {&P::down_bias, &B::d_down_bias, "down_bias", "d_down_bias", r},
      {&P::up_weight, &B::d_up_weight, "up_weight", "d_up_weight", out * r},
      {&P::up_bias, &B::d_up_bias, "up_bias", "d_up_bias", out},
      {&P::norm_weight, &B::d_norm_weight, "norm_weight", "d_norm_weight", d},
      {&P::norm_bias, &B::d_norm_bias, "norm_bias", "d_norm_bias", d},
      {&P::scale, &B::d_scale, "scale", "d_scale", scales},
  }};
}

// Rows that belong to one of N adapters each, whose parameters are stacked: [N, r, D] ...
struct Groups {
  int64_t adapters = 1;            // N
  const int64_t* index = nullptr;  // [M / rows_each]: the adapter of each `rows_each` rows
  int64_t rows_each = 1;
};

struct GroupedForward : BottleneckForward {
  Groups groups;
};

struct GroupedBackward : BottleneckBackward {
  Groups groups;
};

}  // namespace fastadapters

// What every kernel of the bottleneck is told.
#pragma once

#include "../../bottleneck.h"
#include "../tensors.cuh"

namespace fastadapters::cuda {

struct Problem {
  int rows = 0, middle = 1, inner = 1;  // M, and the sizes of the inner row dimensions
  int dim = 0, bottleneck = 0;          // D, r
  int chunks = 0, parts = 0;            // of D and of r
  int width = 0;                        // columns of h and dz as they are kept, zeros beyond r
  Activations x;
  Matrix down, up;   // with norm, `down` is Wd diag(gamma); in backward `up` may be diag(s) Wu
  Vector down_bias;  // with norm, bd + Wd beta
  const float* down_sums = nullptr;  // [r] sums of the rows of `down`; LayerNorm iff present
  Vector up_bias, scale;
  bool channel_scale = false;
  float scale_value = 1, norm_eps = 0;
  Activation activation = Activation::identity;
  const int64_t* seed = nullptr;
  uint32_t threshold = 0;
  float keep = 1;
  float2* stats = nullptr;  // [M]
};

__device__ __forceinline__ int64_t row_offset(const Problem& p, const Activations& t, int row) {
  if (t.uniform) return row * t.strides[2];
  const int outer = row / p.inner, first = outer / p.middle;
  return first * t.strides[0] + (outer - first * p.middle) * t.strides[1] +
         (row - outer * p.inner) * t.strides[2];
}

}  // namespace fastadapters::cuda

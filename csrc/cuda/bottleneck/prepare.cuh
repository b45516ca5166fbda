// The kernel that prepares the weights.
#pragma once

#include "../../bottleneck.h"
#include "../tensors.cuh"

namespace fastadapters::cuda {

// The weights as the kernels want them, where they are not so already.
struct Preparation {
  Bottleneck op;
  char* down = nullptr;  // Wd diag(gamma), rows of down_stride bytes
  char* up = nullptr;    // Wu, times the scale of its row if fold_scale
  int64_t down_stride, up_stride;
  float* down_sums;  // with norm: [r] the sums of the rows of `down`
  float* down_bias;  // with norm: [r] bd + Wd beta
  bool fold_scale = false;
};

constexpr int kUpRows = 16;  // rows of Wu a block prepares

template <class E>
__global__ void __launch_bounds__(256, 4) prepare_weights(const __grid_constant__ Preparation p) {
  using T = typename E::T;
  const Bottleneck& op = p.op;
  const auto at = [&](const Parameter& v, int64_t i, float otherwise, bool exact = false) {
    return v.data ? load<E>({v.data, v.dtype, exact}, i) : otherwise;
  };
  const bool exact_norm = op.x_dtype != op.dtype;  // the norm computes in x's dtype
  int block = blockIdx.x;
  if (p.down) {
    if (block < op.bottleneck) {
      T* const to = reinterpret_cast<T*>(p.down + block * p.down_stride);
      float sum = 0, bias = 0;
      for (int64_t d = threadIdx.x; d < op.dim; d += 256) {
        const float weight = at(op.down_weight, block * op.dim + d, 0);
        const float folded = E::round(weight * at(op.norm_weight, d, 1, exact_norm));
        to[d] = T(folded);
        sum += folded;
        bias += weight * at(op.norm_bias, d, 0, exact_norm);
      }
      if (op.norm_weight.data) {
        sum = block_sum(sum);
        bias = block_sum(bias);
        if (threadIdx.x == 0) {
          p.down_sums[block] = sum;
          p.down_bias[block] = bias + at(op.down_bias, block, 0);
        }
      }
      return;
    }
    block -= int(op.bottleneck);
  }
  const int width = int(op.bottleneck);
  for (int i = threadIdx.x; i < kUpRows * width; i += 256) {
    const int64_t row = int64_t(block) * kUpRows + i / width, column = i % width;
    if (row >= op.dim) break;
    const float weight = at(op.up_weight, row * op.bottleneck + column, 0);
    const float scale = p.fold_scale ? at(op.scale, row, 1) : 1;
    reinterpret_cast<T*>(p.up + row * p.up_stride)[column] = T(weight * scale);
  }
}

}  // namespace fastadapters::cuda

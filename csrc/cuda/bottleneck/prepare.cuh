// The kernel that prepares the weights.
#pragma once

#include "problem.cuh"

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
  int adapters = 1, blocks = 0;     // blocks: of each
  const int* tile_begin = nullptr;  // grouped: what an adapter without tiles has is not read
};

// Mean and reciprocal standard deviation of the rows of x, a warp a row, where they are needed
// before the data pass.
template <class S>
__global__ void __launch_bounds__(256) row_stats(const __grid_constant__ Problem p) {
  const int row = int(blockIdx.x) * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= p.rows) return;
  const int64_t offset = row_offset(p, p.x, p.order ? p.order[row] : row);
  const auto* const x = reinterpret_cast<const typename S::T*>(p.x.data + offset);
  const float first = float(x[0]);  // of equal elements it is the mean exactly
  float sum = 0, squares = 0;
  for (int d = lane; d < p.dim; d += 32) sum += float(x[d]) - first;
  const float mean = first + warp_sum(sum) / p.dim;
  for (int d = lane; d < p.dim; d += 32) {
    const float difference = float(x[d]) - mean;
    squares += difference * difference;
  }
  squares = warp_sum(squares);
  if (lane == 0) p.stats[row] = {mean, rsqrtf(squares / p.dim + p.norm_eps)};
}

constexpr int kUpRows = 16;  // rows of Wu a block prepares

template <class E>
__global__ void __launch_bounds__(256, 4) prepare_weights(const __grid_constant__ Preparation p) {
  using T = typename E::T;
  const Bottleneck& op = p.op;
  const bool exact_norm = op.x_dtype != op.dtype;  // the norm computes in x's dtype
  const int64_t adapter = blockIdx.x / p.blocks;
  if (p.tile_begin && p.tile_begin[adapter] == p.tile_begin[adapter + 1]) return;
  int block = blockIdx.x % p.blocks;
  if (p.down) {
    if (block < op.bottleneck) {
      const int64_t row = adapter * op.bottleneck + block;
      T* const to = reinterpret_cast<T*>(p.down + row * p.down_stride);
      float sum = 0, bias = 0;
      for (int64_t d = threadIdx.x; d < op.dim; d += 256) {
        const float weight = element<E>(op.down_weight, row * op.dim + d, 0);
        const int64_t at = adapter * op.dim + d;
        const float folded = E::round(weight * element<E>(op.norm_weight, at, 1, exact_norm));
        to[d] = T(folded);
        sum += folded;
        bias += weight * element<E>(op.norm_bias, at, 0, exact_norm);
      }
      if (op.norm_weight.data) {
        sum = block_sum(sum);
        bias = block_sum(bias);
        if (threadIdx.x == 0) {
          p.down_sums[row] = sum;
          p.down_bias[row] = bias + element<E>(op.down_bias, row, 0);
        }
      }
      return;
    }
    block -= int(op.bottleneck);
  }
  const int width = int(op.bottleneck);
  for (int i = threadIdx.x; i < kUpRows * width; i += 256) {
    const int64_t of_own = int64_t(block) * kUpRows + i / width, column = i % width;
    if (of_own >= op.out_dim) break;
    const int64_t row = adapter * op.out_dim + of_own;
    const float weight = element<E>(op.up_weight, row * op.bottleneck + column, 0);
    const float scale = p.fold_scale ? element<E>(op.scale, row, 1) : 1;
    reinterpret_cast<T*>(p.up + row * p.up_stride)[column] = T(weight * scale);
  }
}

}  // namespace fastadapters::cuda

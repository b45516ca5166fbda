// The kernels that make the gradients of the parameters from partial sums.
#pragma once

#include "gradients.cuh"

namespace fastadapters::cuda {

struct Finish {
  BottleneckBackward op;
  Partial partials[kJobs];
  float* d_scales;                   // [N, D_out], where the scale is one number
  int down_blocks;                   // an adapter's first blocks: of columns of D_in
  int up_blocks;                     // the others: of D_out
  int warps;                         // that share a column of D_out: 1 or kFinishWarps
  const int* split_begin = nullptr;  // grouped: each adapter's first split [N + 1]
};

constexpr int kFinishWarps = 8;  // in a block

// The splits with an adapter's sums; none if it has no rows: then its gradients are exact zeros.
struct Splits {
  int first, count;

  __device__ __forceinline__ Splits(const Finish& p, const Partial& partial, int64_t adapter)
      : first(p.split_begin ? p.split_begin[adapter] : 0),
        count(p.split_begin ? p.split_begin[adapter + 1] - first : partial.splits) {}

  __device__ __forceinline__ float own(float gradient) const { return count ? gradient : 0; }
};

// Adds the splits' elements, `stride` apart, in order: every `every`-th from `first` on.
__device__ __forceinline__ float add_splits(const float* from, int64_t stride, int splits,
                                            int first = 0, int every = 1) {
  float total = 0;
#pragma unroll 4
  for (int split = first; split < splits; split += every) total += from[split * stride];
  return total;
}

// One warp makes a column of dWd and its elements of the norm's gradients; that of d = 0 makes dbd.
template <class E>
__device__ __forceinline__ void finish_down(const Finish& p, int64_t adapter, int64_t d) {
  const BottleneckBackward& op = p.op;
  const Partial& partial = p.partials[kDown];
  if (d >= op.dim) return;
  const int lane = threadIdx.x % 32;
  const bool exact = op.x_dtype != op.dtype;
  const Splits splits(p, partial, adapter);
  const int64_t own_d = adapter * op.dim + d, sums_d = splits.first * op.dim + d;
  const float gamma = element<E>(op.norm_weight, own_d, 1, exact);
  const float beta = element<E>(op.norm_bias, own_d, 0, exact);
  const bool multiplied = op.d_down_weight.data || op.d_norm_weight.data || op.d_norm_bias.data;
  const bool shifted = op.d_norm_bias.data || (op.norm_bias.data && op.d_down_weight.data);
  const Partial& masks = p.partials[kMasks];  // where it is there, in the place of the sums
  const bool biased = (shifted && !masks.products) || (op.d_down_bias.data && d == 0);
  float d_gamma = 0, d_beta = 0;
  for (int i = lane; i < op.bottleneck; i += 32) {
    float product = 0, bias = 0;
    const int64_t own_i = adapter * op.bottleneck + i;
    if (multiplied) {
      product = add_splits(partial.products + sums_d * partial.width + i, op.dim * partial.width,
                           splits.count);
    }
    if (biased) {
      bias = add_splits(partial.sums + int64_t(splits.first) * partial.width + i, partial.width,
                        splits.count);
    }
    if (op.d_down_bias.data && d == 0) store(op.d_down_bias, own_i, bias);
    if (shifted && masks.products) {
      bias =
          add_splits(masks.products + sums_d * masks.width + i, op.dim * masks.width, splits.count);
    }
    if (op.d_down_weight.data) {
      store(op.d_down_weight, own_i * op.dim + d, splits.own(gamma * product + beta * bias));
    }
    if (op.d_norm_weight.data || op.d_norm_bias.data) {
      const float weight = element<E>(op.down_weight, own_i * op.dim + d, 0);
      d_gamma += product * weight;
      d_beta += bias * weight;
    }
  }
  d_gamma = warp_sum(d_gamma);
  d_beta = warp_sum(d_beta);
  if (lane != 0) return;
  if (op.d_norm_weight.data) store(op.d_norm_weight, own_d, splits.own(d_gamma));
  if (op.d_norm_bias.data) store(op.d_norm_bias, own_d, splits.own(d_beta));
}

// One warp makes a row of dWu and its elements of dbu and of the scale's gradient. Where splits are
// many, a block: a warp adds every eighth.
template <class E>
__device__ __forceinline__ void finish_up(const Finish& p, int64_t adapter, int64_t d) {
  __shared__ float scratch[kFinishWarps][32];
  const BottleneckBackward& op = p.op;
  const Partial& partial = p.partials[kUp];
  if (d >= op.out_dim) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, share = warp % p.warps;
  const Splits splits(p, partial, adapter);
  const int64_t own_d = adapter * op.out_dim + d, sums_d = splits.first * op.out_dim + d;
  const float scale = element<E>(op.scale, op.channel_scale ? own_d : adapter, op.scale_value);
  const bool multiplied = op.d_up_weight.data || op.d_scale.data;
  float d_scale = 0;
  for (int first = 0; multiplied && first < op.bottleneck; first += 32) {
    const int i = first + lane;
    float product = 0;
    if (i < op.bottleneck) {
      product = add_splits(partial.products + sums_d * partial.width + i,
                           op.out_dim * partial.width, splits.count, share, p.warps);
    }
    if (p.warps > 1) {
      scratch[warp][lane] = product;
      __syncthreads();
      for (int w = 1; w < kFinishWarps && warp == 0; ++w) product += scratch[w][lane];
      __syncthreads();
    }
    if (share != 0 || i >= op.bottleneck) continue;
    const int64_t at = own_d * op.bottleneck + i;
    if (op.d_up_weight.data) store(op.d_up_weight, at, splits.own(scale * product));
    if (op.d_scale.data) d_scale += product * element<E>(op.up_weight, at, 0);
  }
  if (share != 0) return;
  float sum = 0;
  if (op.d_up_bias.data || (op.d_scale.data && op.up_bias.data)) {
    sum = add_splits(partial.sums + sums_d, op.out_dim, splits.count, lane, 32);
  }
  d_scale = warp_sum(d_scale);
  sum = warp_sum(sum);
  if (lane != 0) return;
  if (op.d_up_bias.data) store(op.d_up_bias, own_d, splits.own(scale * sum));
  if (op.d_scale.data) {
    d_scale = splits.own(d_scale + element<E>(op.up_bias, own_d, 0) * sum);
    if (op.channel_scale) {
      store(op.d_scale, own_d, d_scale);
    } else {
      p.d_scales[own_d] = d_scale;
    }
  }
}

template <class E>
__global__ void __launch_bounds__(256) finish_gradients(const __grid_constant__ Finish p) {
  const int blocks = p.down_blocks + p.up_blocks, warp = threadIdx.x / 32;
  const int64_t adapter = blockIdx.x / blocks;
  const int block = blockIdx.x % blocks;
  if (block < p.down_blocks) {
    finish_down<E>(p, adapter, int64_t(block) * kFinishWarps + warp);
  } else {
    finish_up<E>(p, adapter, (int64_t(block - p.down_blocks) * kFinishWarps + warp) / p.warps);
  }
}

// Block: an adapter.
static __global__ void __launch_bounds__(256)
    finish_scale(const float* d_scales, int64_t count, Parameter d_scale) {
  float sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += 256) sum += d_scales[blockIdx.x * count + i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) store(d_scale, blockIdx.x, sum);
}

}  // namespace fastadapters::cuda

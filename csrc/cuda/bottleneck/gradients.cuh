// The kernels that make the gradients of the parameters from x, dy, h and dz.
#pragma once

#include "../product.cuh"
#include "walk.cuh"

namespace fastadapters::cuda {

// Partial sums of a product [splits, D, width] and of its narrow or its wide factor, [splits,
// width] (dz) or [splits, D] (dy).
struct Partial {
  int splits = 0, width = 0;
  float *products = nullptr, *sums = nullptr;
};

struct WeightPass : Problem {
  Activations dy;
  const char* hidden = nullptr;
  const char* d_hidden = nullptr;
  int first_job = 0;  // 0: dz^T x and the sums of dz; 1: dy^T h and the sums of dy
  int rows_per_split = 0;
  Partial partials[2];
};

// A chunk of x or dy, stored as S, and the panels of dz or h; as many as two blocks can have on
// every architecture.
template <class E, int kWidth, class S>
struct Stages {
  static constexpr int kHidden = kPanels<E, S> * kPanel;  // where dz or h begins
  static constexpr int kBytes = kHidden + Sizes<E, kWidth>::kHiddenPanels * kPanel;
  static constexpr int kCount = kBytes == 2 * kPanel ? 3 : 2;
  static constexpr int kSummed = std::max(Sizes<E, kWidth>::kHiddenPanels, kPanels<E, S>);
};

// Block (chunk and part, split, job) takes a chunk of D, a part of r and a share of the rows. Job
// 0: norm(x)^T dz, less gamma and beta, and the sums of dz; job 1: dy^T h, and the sums of dy.
template <class E, int kWidth, class S>
__global__ void __launch_bounds__(kThreads, 2) weight_pass(const __grid_constant__ WeightPass p) {
  using T = typename E::T;
  using L = Sizes<E, kWidth>;
  using Stage = Stages<E, kWidth, S>;
  constexpr int kSize = L::kSize, kChunk = L::kChunk;
  constexpr int kStage = Stage::kBytes, kStages = Stage::kCount;
  constexpr int kM = kChunk / 32, kN = kWidth / 16;
  extern __shared__ __align__(128) char shared[];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, pair = lane % 4;
  const int part = blockIdx.x % p.parts, chunk = blockIdx.x / p.parts, split = blockIdx.y;
  const int job = p.first_job + blockIdx.z;
  const bool normalise = job == 0 && p.down_sums != nullptr;
  const bool sum = job == 0 ? chunk == 0 : part == 0;
  const int width = p.width;
  const int first_row = split * p.rows_per_split;
  const int last_row = min(first_row + p.rows_per_split, p.rows);
  const int steps = max(last_row - first_row + kRows - 1, 0) / kRows;
  const Activations& wide = job == 0 ? p.x : p.dy;
  const char* const narrow = (job == 0 ? p.d_hidden : p.hidden) + int64_t(part) * kWidth * kSize;

  const auto load_next = [&](int step) {
    if (step < steps) {
      char* const stage = shared + step % kStages * kStage;
      const int row = first_row + step * kRows, rows = last_row - row;
      load_chunk<E, S>(stage, rows, chunk, p.dim, wide.aligned, [&](int i) {
        return wide.data + row_offset(p, wide, row + min(i, rows - 1));
      });
#pragma unroll
      for (int j = 0; j < L::kHiddenPanels; ++j) {
        const char* const data = narrow + int64_t(row) * width * kSize + j * kLine;
        load_panel<T, kRows, L::kHiddenLine>(stage + Stage::kHidden + j * kPanel, rows,
                                             (width - part * kWidth) * kSize - j * kLine, true,
                                             [&](int i) { return data + i * width * kSize; });
      }
    }
    copy_commit();
  };

  constexpr int kSummed = Stage::kSummed;
  const float no_shift[kM][2] = {};
  float acc[kM][kN][4] = {};
  float2 column_sums[kSummed] = {};  // of this lane's 4 bytes of a line, this warp's rows
  for (int i = 0; i < kStages - 1; ++i) load_next(i);
  for (int step = 0; step < steps; ++step) {
    copy_wait<kStages - 2>();
    __syncthreads();
    load_next(step + kStages - 1);
    char* const stage = shared + step % kStages * kStage;
    if (normalise) {
      constexpr int kAcross = kPanels<E, S> * kSegments;
      const int segment = threadIdx.x % kAcross;
#pragma unroll
      for (int i = threadIdx.x / kAcross; i < kRows; i += kThreads / kAcross) {
        const int row = first_row + step * kRows + i;
        const float2 stats = row < last_row ? p.stats[row] : float2{0, 0};
        char* const place =
            stage + segment / kSegments * kPanel + segment_offset(i, segment % kSegments);
        float v[16 / sizeof(typename S::T)];
        load_segment<S>(place, v);
#pragma unroll
        for (float& value : v) value = (value - stats.x) * stats.y;
        store_segment<S>(place, v);
      }
      __syncthreads();
    }
    multiply<E, kRows * kSize / 32, true, true, S>(
        acc, {stage, kPanel, warp / 2 * (kChunk / 2)},
        {stage + Stage::kHidden, kPanel, warp % 2 * (kWidth / 2)}, no_shift);
    if (sum) {
      const auto add_columns = [&](auto element, const char* panels, int count, int bytes) {
        using Element = decltype(element);
#pragma unroll
        for (int j = 0; j < kSummed; ++j) {
          if (j == count || 4 * lane >= bytes) break;
#pragma unroll 4
          for (int i = warp; i < kRows; i += kThreads / 32) {
            const char* const place = panels + byte_offset(kPanel, i, j * kLine + 4 * lane);
            if constexpr (sizeof(typename Element::T) == 4) {
              column_sums[j].x += *reinterpret_cast<const float*>(place);
            } else {
              const float2 v = load_pair<Element>(place);
              column_sums[j].x += v.x;
              column_sums[j].y += v.y;
            }
          }
        }
      };
      if (job == 0) {
        add_columns(E{}, stage + Stage::kHidden, L::kHiddenPanels, kWidth * kSize);
      } else {
        add_columns(S{}, stage, kPanels<E, S>, kLine);
      }
    }
  }

  float* const to =
      p.partials[job].products + (int64_t(split) * p.dim + chunk * kChunk) * width + part * kWidth;
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    const int row = warp / 2 * (kChunk / 2) + 8 * i + group;
    if (chunk * kChunk + row >= p.dim) continue;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int column = warp % 2 * (kWidth / 2) + n * 8 + 2 * pair;
      if (part * kWidth + column >= width) break;
      *reinterpret_cast<float2*>(to + int64_t(row) * width + column) = {
          acc[i / 2][n][i % 2 * 2], acc[i / 2][n][i % 2 * 2 + 1]};
    }
  }

  if (sum) {
    __syncthreads();  // the stages are free
    float2* const scratch = reinterpret_cast<float2*>(shared);
#pragma unroll
    for (int j = 0; j < kSummed; ++j) {
      scratch[j * kThreads + threadIdx.x] = column_sums[j];
    }
    __syncthreads();
    const int per_lane = 4 / (job == 0 ? kSize : int(sizeof(typename S::T)));
    for (int i = threadIdx.x; i < (job == 0 ? kWidth : kChunk); i += kThreads) {
      float total = 0;
      for (int w = 0; w < kThreads / 32; ++w) {
        const int lane_of = i / per_lane;
        const float2 v = scratch[lane_of / 32 * kThreads + w * 32 + lane_of % 32];
        total += i % per_lane == 0 ? v.x : v.y;
      }
      if (job == 0 && part * kWidth + i < width) {
        p.partials[0].sums[split * width + part * kWidth + i] = total;
      } else if (job == 1 && chunk * kChunk + i < p.dim) {
        p.partials[1].sums[int64_t(split) * p.dim + chunk * kChunk + i] = total;
      }
    }
  }
}

struct Finish {
  BottleneckBackward op;
  Partial partials[2];
  float* d_scales;  // [D], where the scale is one number
  int warps;        // that share a column of D: 1 or kFinishWarps
};

constexpr int kFinishWarps = 8;  // in a block

// Adds the partial sums in order. One warp for each column of D: its row of dWu, its column of dWd,
// its element of everything else. Where splits are many, a block: a warp adds every eighth.
template <class E>
__global__ void __launch_bounds__(256) finish_gradients(const __grid_constant__ Finish p) {
  __shared__ float scratch[kFinishWarps][3][32];
  const BottleneckBackward& op = p.op;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int share = warp % p.warps;
  const int64_t d = (int64_t(blockIdx.x) * kFinishWarps + warp) / p.warps;
  if (d >= op.dim) return;
  const auto at = [&](const Parameter& v, int64_t i, float otherwise, bool exact = false) {
    return v.data ? load<E>({v.data, v.dtype, exact}, i) : otherwise;
  };
  const bool exact_norm = op.x_dtype != op.dtype;
  const float scale = at(op.scale, op.channel_scale ? d : 0, op.scale_value);
  const float gamma = at(op.norm_weight, d, 1, exact_norm);
  const float beta = at(op.norm_bias, d, 0, exact_norm);
  const bool down = op.d_down_weight.data || op.d_norm_weight.data || op.d_norm_bias.data;
  const bool up = op.d_up_weight.data || op.d_scale.data;
  const bool biased = op.d_norm_bias.data || (op.norm_bias.data && op.d_down_weight.data) ||
                      (op.d_down_bias.data && d == 0);
  float d_scale = 0, d_gamma = 0, d_beta = 0;
  for (int first = 0; first < op.bottleneck; first += 32) {
    const int i = first + lane;
    const auto add = [&](bool wanted, const Partial& partial, const float* from, int64_t stride) {
      float total = 0;
      if (wanted && i < op.bottleneck) {
#pragma unroll 4
        for (int split = share; split < partial.splits; split += p.warps) {
          total += from[split * stride + i];
        }
      }
      return total;
    };
    const Partial &below = p.partials[0], &above = p.partials[1];
    float product[2] = {add(down, below, below.products + d * below.width, op.dim * below.width),
                        add(up, above, above.products + d * above.width, op.dim * above.width)};
    float bias = add(biased, below, below.sums, below.width);
    if (p.warps > 1) {
      float (&own)[3][32] = scratch[warp];
      own[0][lane] = product[0], own[1][lane] = product[1], own[2][lane] = bias;
      __syncthreads();
      for (int w = 1; w < kFinishWarps && warp == 0; ++w) {
        product[0] += scratch[w][0][lane];
        product[1] += scratch[w][1][lane];
        bias += scratch[w][2][lane];
      }
      __syncthreads();
    }
    if (share != 0 || i >= op.bottleneck) continue;
    if (op.d_up_weight.data) store(op.d_up_weight, d * op.bottleneck + i, scale * product[1]);
    if (op.d_scale.data) {
      d_scale += product[1] * at(op.up_weight, d * op.bottleneck + i, 0);
    }
    if (op.d_down_weight.data) {
      store(op.d_down_weight, i * op.dim + d, gamma * product[0] + beta * bias);
    }
    if (op.d_norm_weight.data || op.d_norm_bias.data) {
      const float weight = at(op.down_weight, i * op.dim + d, 0);
      d_gamma += product[0] * weight;
      d_beta += bias * weight;
    }
    if (op.d_down_bias.data && d == 0) store(op.d_down_bias, i, bias);
  }
  if (share != 0) return;
  float sum = 0;
  if (op.d_up_bias.data || (op.d_scale.data && op.up_bias.data)) {
    for (int split = lane; split < p.partials[1].splits; split += 32) {
      sum += p.partials[1].sums[split * op.dim + d];
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    d_scale += __shfl_xor_sync(0xffffffff, d_scale, step);
    d_gamma += __shfl_xor_sync(0xffffffff, d_gamma, step);
    d_beta += __shfl_xor_sync(0xffffffff, d_beta, step);
    sum += __shfl_xor_sync(0xffffffff, sum, step);
  }
  if (lane != 0) return;
  if (op.d_norm_weight.data) store(op.d_norm_weight, d, d_gamma);
  if (op.d_norm_bias.data) store(op.d_norm_bias, d, d_beta);
  if (op.d_up_bias.data) store(op.d_up_bias, d, scale * sum);
  if (op.d_scale.data) {
    d_scale += at(op.up_bias, d, 0) * sum;
    if (op.channel_scale) {
      store(op.d_scale, d, d_scale);
    } else {
      p.d_scales[d] = d_scale;
    }
  }
}

static __global__ void __launch_bounds__(256)
    finish_scale(const float* d_scales, int64_t count, Parameter d_scale) {
  float sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += 256) sum += d_scales[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) store(d_scale, 0, sum);
}

}  // namespace fastadapters::cuda

// The kernels that make the gradients of the parameters from x, dy, h and dz.
#pragma once

#include "../product.cuh"
#include "walk.cuh"

namespace fastadapters::cuda {

// What the weight pass makes: norm(x)^T dz, less gamma and beta, and the sums of dz; the mask of
// input dropout in the place of norm(x), for beta; dy^T h and the sums of dy.
enum Job { kDown, kMasks, kUp, kJobs };

// Partial sums of a product [splits, D_in or D_out, width] and of its narrow or its wide factor,
// [splits, width] (dz) or [splits, D_out] (dy).
struct Partial {
  int splits = 0, width = 0;
  float *products = nullptr, *sums = nullptr;
};

struct WeightPass : Problem {
  Activations dy;
  const char* hidden = nullptr;  // h [M, hidden_width] and dz [M, width]
  const char* d_hidden = nullptr;
  int hidden_width = 0;
  int down_blocks = 0, mask_blocks = 0;  // of a split, in the order of the jobs
  int begin_row = 0, end_row = 0, rows_per_split = 0;
  bool add = false;  // to the partial sums of the rows before
  Partial partials[kJobs];
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

// What the warps of a block have of a product: of `chunk` of `dim` columns and `part` of r.
template <class E, int kWidth, int kM, int kN>
__device__ __forceinline__ void store_products(const WeightPass& p, const Partial& partial,
                                               const float (&acc)[kM][kN][4], int split, int chunk,
                                               int part, int dim) {
  constexpr int kChunk = Sizes<E, kWidth>::kChunk;
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
  float* const to =
      partial.products + (int64_t(split) * dim + chunk * kChunk) * p.width + part * kWidth;
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    const int row = warp / 2 * (kChunk / 2) + 8 * i + group;
    if (chunk * kChunk + row >= dim) continue;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int column = warp % 2 * (kWidth / 2) + n * 8 + 2 * pair;
      if (part * kWidth + column >= p.width) break;
      float2& sum = *reinterpret_cast<float2*>(to + int64_t(row) * p.width + column);
      const float2 before = p.add ? sum : float2{0, 0};
      sum = {before.x + acc[i / 2][n][i % 2 * 2], before.y + acc[i / 2][n][i % 2 * 2 + 1]};
    }
  }
}

// Block (job, chunk and part; split) takes a chunk of D_in or D_out, a part of r and a share of the
// rows, which are one adapter's.
template <class E, int kWidth, class S, bool kGrouped>
__global__ void __launch_bounds__(kThreads, 2) weight_pass(const __grid_constant__ WeightPass p) {
  using T = typename E::T;
  using L = Sizes<E, kWidth>;
  using Stage = Stages<E, kWidth, S>;
  constexpr int kSize = L::kSize, kChunk = L::kChunk;
  constexpr int kStage = Stage::kBytes, kStages = Stage::kCount;
  constexpr int kM = kChunk / 32, kN = kWidth / 16;
  extern __shared__ __align__(128) char shared[];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int split = blockIdx.y;
  int block = blockIdx.x, job = kDown;
  if (block >= p.down_blocks) block -= p.down_blocks, job = kMasks;
  if (job == kMasks && block >= p.mask_blocks) block -= p.mask_blocks, job = kUp;
  const int part = block % p.parts, chunk = block / p.parts, dim = job == kUp ? p.out_dim : p.dim;
  const bool normalised = job == kDown && p.norm;
  const bool drop = job != kUp && p.input_dropout.seed != nullptr;
  const bool sum = job == kUp ? part == 0 : job == kDown && chunk == 0;
  const int width = job == kUp ? p.hidden_width : p.width;
  if (kGrouped && p.splits[split].rows == 0) return;
  const int first_row = kGrouped ? p.splits[split].first : p.begin_row + split * p.rows_per_split;
  const int last_row =
      kGrouped ? first_row + p.splits[split].rows : min(first_row + p.rows_per_split, p.end_row);
  const int steps = max(last_row - first_row + kRows - 1, 0) / kRows;
  const Activations& wide = job == kUp ? p.dy : p.x;
  const char* const narrow = (job == kUp ? p.hidden : p.d_hidden) + int64_t(part) * kWidth * kSize;

  const auto load_next = [&](int step) {
    if (step < steps) {
      char* const stage = shared + step % kStages * kStage;
      const int row = first_row + step * kRows, rows = last_row - row;
      if (job != kMasks) {
        load_chunk<E, S>(stage, rows, chunk, dim, wide.aligned, [&](int i) {
          return wide.data +
                 row_offset(p, wide, row_at<kGrouped>(p, row + min(i, rows - 1), last_row));
        });
      }
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
    // On each segment of the chunk of x: change(its elements, row, column).
    const auto each_segment = [&](auto unroll, auto change) {
      constexpr int kAcross = kPanels<E, S> * kSegments, kElements = 16 / sizeof(typename S::T);
      constexpr int kUnroll = decltype(unroll)::value;
      const int segment = threadIdx.x % kAcross;
#pragma unroll kUnroll
      for (int i = threadIdx.x / kAcross; i < kRows; i += kThreads / kAcross) {
        char* const place =
            stage + segment / kSegments * kPanel + segment_offset(i, segment % kSegments);
        float v[kElements];
        if (job != kMasks) load_segment<S>(place, v);
        change(v, first_row + step * kRows + i, chunk * kChunk + segment * kElements);
        store_segment<S>(place, v);
      }
      __syncthreads();
    };
    const auto normalise = [&](auto& v, int row, int) {
      const float2 stats = row < last_row ? p.stats[row] : float2{0, 0};
#pragma unroll
      for (float& value : v) value = (value - stats.x) * stats.y;
    };
    if (drop) {
      each_segment(std::integral_constant<int, 1>{}, [&](auto& v, int row, int column) {
        if (job == kMasks) {
#pragma unroll
          for (float& value : v) value = 1;
        }
        if (normalised) normalise(v, row, column);
        p.input_dropout.apply(v, row_at<kGrouped>(p, row, last_row), column, dim);
      });
    } else if (normalised) {
      each_segment(std::integral_constant<int, kRows>{}, normalise);
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
      if (job == kDown) {
        add_columns(E{}, stage + Stage::kHidden, L::kHiddenPanels, kWidth * kSize);
      } else {
        add_columns(S{}, stage, kPanels<E, S>, kLine);
      }
    }
  }

  store_products<E, kWidth>(p, p.partials[job], acc, split, chunk, part, dim);
  if (sum) {
    __syncthreads();  // the stages are free
    float2* const scratch = reinterpret_cast<float2*>(shared);
#pragma unroll
    for (int j = 0; j < kSummed; ++j) {
      scratch[j * kThreads + threadIdx.x] = column_sums[j];
    }
    __syncthreads();
    const int per_lane = 4 / (job == kDown ? kSize : int(sizeof(typename S::T)));
    for (int i = threadIdx.x; i < (job == kDown ? kWidth : kChunk); i += kThreads) {
      float total = 0;
      for (int w = 0; w < kThreads / 32; ++w) {
        const int lane_of = i / per_lane;
        const float2 v = scratch[lane_of / 32 * kThreads + w * 32 + lane_of % 32];
        total += i % per_lane == 0 ? v.x : v.y;
      }
      const int at = job == kDown ? part * kWidth + i : chunk * kChunk + i;
      const int size = job == kDown ? width : dim;
      if (at >= size) continue;
      float& of_split = p.partials[job].sums[int64_t(split) * size + at];
      of_split = (p.add ? of_split : 0) + total;
    }
  }
}

}  // namespace fastadapters::cuda

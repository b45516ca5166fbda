// From tokens to P: forward's first part.
#pragma once

#include <algorithm>

#include "../activation.cuh"
#include "../product.cuh"
#include "problem.cuh"

namespace fastadapters::cuda::fusion {

// Panels that hold kRows rows of kWidth columns of E.
template <class E, int kWidth>
struct Hidden {
  static constexpr int kSize = sizeof(typename E::T);
  static constexpr int kPanelCount = (kWidth * kSize - 1) / kLine + 1;
  static constexpr int kBytes = kPanelCount * kPanel;
  static constexpr int kUsed = std::min(kWidth * kSize, kLine);  // bytes of a row of a panel
};

// Shared memory of down_tile: stages of a chunk of x and of Wd, and when they are read, H and A.
template <class E, int kWidth, class X>
struct Down {
  static constexpr int kSize = sizeof(typename E::T);
  static constexpr int kX = kPanels<E, X> * kPanel;
  static constexpr int kStage = kX + kWidth * kLine;
  static constexpr int kStages = kStage <= 10240 ? 4 : 3;
  static constexpr int kFactor = kRows * kSize / kLine * kPanel;
  static constexpr int kBytes = std::max(kStages * kStage, Hidden<E, kWidth>::kBytes + kFactor);
};

// P of kRows tokens of an item, to in.partials; z to in.z.
template <class E, int kWidth, class X>
__device__ __forceinline__ void down_tile(const Problem& p, char* shared, int m, int item,
                                          int tile) {
  using L = Down<E, kWidth, X>;
  constexpr int kSize = L::kSize, kChunk = kLine / kSize, kN = kWidth / 8;
  const Input& in = p.input[m];
  const int first = tile * kRows, rows = min(counted(in, item) - first, kRows);
  if (rows <= 0) return;
  const char* const x = in.x.data + item * in.x.strides[1] + first * in.x.strides[2];
  const int chunks = (in.dim + kChunk - 1) / kChunk;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, pair = lane % 4;
  const float no_shift[1][2] = {};
  char* const hidden = shared;
  char* const factor = shared + Hidden<E, kWidth>::kBytes;

  for (int begin = 0; begin < in.width; begin += kWidth) {
    const auto load_next = [&](int step) {
      if (step < chunks) {
        char* const stage = shared + step % L::kStages * L::kStage;
        load_chunk<E, X>(stage, rows, step, in.dim, in.x.aligned,
                         [&](int i) { return x + i * in.x.strides[2]; });
        fill_parameter<E, kLine>(stage + L::kX, 0, kWidth, in.down_weight, in.width, in.dim, 1, 0,
                                 begin, step * kChunk);
      }
      copy_commit();
    };
    if (kWidth > kPart && begin > 0) __syncthreads();
#pragma unroll 1
    for (int i = 0; i < L::kStages - 1; ++i) load_next(i);
    float z[1][kN][4] = {};
#pragma unroll 1
    for (int step = 0; step < chunks; ++step) {
      copy_wait<L::kStages - 2>();
      __syncthreads();
      load_next(step + L::kStages - 1);
      const char* const stage = shared + step % L::kStages * L::kStage;
      multiply<E, 4, false, false, X>(z, {stage, kPanel, 16 * warp}, {stage + L::kX, 0, 0},
                                      no_shift);
    }

    float bias[kN][2], h[1][kN][4];
    load_columns<E>(bias, {in.down_bias.data, in.down_bias.dtype, false}, begin + 2 * pair,
                    in.width);
#pragma unroll
    for (int i = 0; i < 4 * kN; ++i) z[0][i / 4][i % 4] += bias[i / 4][i % 2];
    if (in.z) {
#pragma unroll
      for (int i = 0; i < 2 * kN; ++i) {
        const int row = 16 * warp + i % 2 * 8 + group, column = begin + i / 2 * 8 + 2 * pair;
        if (row >= rows) continue;
        char* const to = in.z + (int64_t(item) * in.tokens + first + row) * in.width * kSize;
        store_two<E>(to, column, in.width - column, false, z[0][i / 2][i % 2 * 2],
                     z[0][i / 2][i % 2 * 2 + 1]);
      }
    }
    using Halves = float (&)[2][kN / 2][4];
    activate<false>(p.activation, reinterpret_cast<Halves>(z), reinterpret_cast<Halves>(h),
                    reinterpret_cast<Halves>(z));
    __syncthreads();  // the stages have been read
    const Fragment<E> place(16 * warp, 0, kPanel);
#pragma unroll
    for (int i = 0; i < 2 * kN; ++i) {
      const bool counts = 16 * warp + i % 2 * 8 + group < rows;
      const int column = begin + i / 2 * 8 + 2 * pair;
      const float* const value = h[0][i / 2] + i % 2 * 2;
      char* const to = hidden + (kWidth * kSize > kLine && i >= kN ? kPanel : 0);
      constexpr int kPerPanel = kLine / (8 * kSize);
      store_pair<E>(to + place(i % 2, i / 2 % kPerPanel),
                    counts && column < in.width ? value[0] : 0,
                    counts && column + 1 < in.width ? value[1] : 0);
    }
    for (int c = 0; c < p.factors(); c += kRows) {
      if (c > 0) __syncthreads();
      const int count = min((p.factors() - c + 15) & ~15, kRows);
      fill_time_factor<E>(factor, kPanel, count, p, in, c, first, rows);
      __syncthreads();
      if (16 * warp >= count) continue;
      float sum[1][kN][4] = {};
      multiply<E, kRows * kSize / 32, false, true>(sum, {factor, kPanel, 16 * warp},
                                                   {hidden, kPanel, 0}, no_shift);
#pragma unroll
      for (int i = 0; i < 2 * kN; ++i) {
        const int row = c + 16 * warp + i % 2 * 8 + group, column = begin + i / 2 * 8 + 2 * pair;
        if (row >= p.factors()) continue;
        const int64_t at = (int64_t(tile) * p.items + item) * p.factors() + row;
        store_two(in.partials + at * in.width + column, in.width - column, sum[0][i / 2][i % 2 * 2],
                  sum[0][i / 2][i % 2 * 2 + 1]);
      }
    }
  }
}

// visit(E{}) or visit(Full{}), as x is stored.
template <class E, class Visit>
__device__ __forceinline__ void by_storage(const Input& in, Visit visit) {
  if constexpr (sizeof(typename E::T) == 2) {
    if (in.wide_x) return visit(Full{});
  }
  visit(E{});
}

// Which modality an item's tile is of; `tile` becomes its number there.
__device__ __forceinline__ int modality_of(const Problem& p, int* tile) {
  int m = 0;
  while (*tile >= p.input[m].tiles) *tile -= p.input[m++].tiles;
  return m;
}

template <class E, int kWidth>
__device__ __forceinline__ void down_item_tile(const Problem& p, char* shared, int item, int tile) {
  const int m = modality_of(p, &tile);
  by_storage<E>(p.input[m], [&](auto stored) {
    down_tile<E, kWidth, decltype(stored)>(p, shared, m, item, tile);
  });
}

// A block for each tile of each item, where r > kPart.
template <class E>
__global__ void __launch_bounds__(kThreads, E::kTensorCore ? 3 : 2)
    down_wide(const __grid_constant__ Problem p) {
  extern __shared__ __align__(128) char shared[];
  down_item_tile<E, 64>(p, shared, blockIdx.x / p.tiles, blockIdx.x % p.tiles);
}

}  // namespace fastadapters::cuda::fusion

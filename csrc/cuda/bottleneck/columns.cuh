// The kernel that makes dx and the parameters' gradients of a chunk of columns, where dx takes dy
// and the rows that blocks of the data pass are at would not fit the L2 cache: dy would come from
// memory three times, for dz, for dx and for dWu. Here dx and dWu share it; the data pass makes dz
// alone. For 16-bit products with x and y as they are, up to one part of r, without LayerNorm and
// input dropout.
#pragma once

#include "gradients.cuh"

namespace fastadapters::cuda {

struct ColumnPass : WeightPass {
  Activations dx;
};

// The chunks of x and dy, dz and h of a tile of rows; Wd's columns lie behind all stages.
template <class E, int kWidth>
struct ColumnStages {
  static constexpr int kBytes = 4 * kPanel, kCount = 2;
  static constexpr int kDown = kCount * kBytes, kShared = kDown + kWidth * kLine;
};

// Block (chunk, split).
template <class E, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) column_pass(const __grid_constant__ ColumnPass p) {
  using T = typename E::T;
  using L = Sizes<E, kWidth>;
  using Stage = ColumnStages<E, kWidth>;
  constexpr int kSize = L::kSize, kChunk = L::kChunk, kSteps = kRows * kSize / 32;
  constexpr int kM = kChunk / 32, kN = kWidth / 16, kUpN = kChunk / 16;
  extern __shared__ __align__(128) char shared[];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int chunk = blockIdx.x, split = blockIdx.y;
  const int first_row = split * p.rows_per_split;
  const int last_row = min(first_row + p.rows_per_split, p.end_row);
  const int steps = max(last_row - first_row + kRows - 1, 0) / kRows;

  const auto load_next = [&](int step) {
    if (step < steps) {
      char* const stage = shared + step % 2 * Stage::kBytes;
      const int row = first_row + step * kRows, rows = last_row - row;
      const auto load_wide = [&](char* panel, const Activations& from) {
        load_chunk<E, E>(panel, rows, chunk, p.dim, from.aligned, [&](int i) {
          return from.data + row_offset(p, from, row + min(i, rows - 1));
        });
      };
      const auto load_narrow = [&](char* panel, const char* from, int width) {
        const char* const data = from + int64_t(row) * width * kSize;
        load_panel<T, kRows, L::kHiddenLine>(panel, rows, width * kSize, true,
                                             [&](int i) { return data + i * width * kSize; });
      };
      load_wide(stage, p.x);
      load_wide(stage + kPanel, p.dy);
      load_narrow(stage + 2 * kPanel, p.d_hidden, p.width);
      load_narrow(stage + 3 * kPanel, p.hidden, p.hidden_width);
    }
    copy_commit();
  };

  load_panel<T, kWidth>(shared + Stage::kDown, p.bottleneck, p.dim * kSize - chunk * kLine, true,
                        [&](int row) { return p.down.data + chunk * kLine + row * p.down.stride; });
  load_next(0);
  const float no_shift[2][2] = {};
  float down[kM][kN][4] = {}, up[kM][kN][4] = {};
  float dy_sums[kM][4] = {}, dz_sum = 0;
  for (int step = 0; step < steps; ++step) {
    copy_wait<0>();
    __syncthreads();
    load_next(step + 1);
    char* const x = shared + step % 2 * Stage::kBytes;
    char *const dy = x + kPanel, *const dz = x + 2 * kPanel, *const h = x + 3 * kPanel;
    multiply<E, kSteps, true, true>(down, {x, kPanel, warp / 2 * (kChunk / 2)},
                                    {dz, kPanel, warp % 2 * (kWidth / 2)}, no_shift);
    multiply<E, kSteps, true, true, E, true>(up, {dy, kPanel, warp / 2 * (kChunk / 2)},
                                             {h, kPanel, warp % 2 * (kWidth / 2)}, no_shift,
                                             dy_sums);
    if (chunk == 0 && threadIdx.x < kWidth) {
#pragma unroll 8
      for (int i = 0; i < kRows; ++i) {
        const char* const place = dz + byte_offset(kPanel, i, int(threadIdx.x) * kSize);
        dz_sum += float(*reinterpret_cast<const T*>(place));
      }
    }
    float out[2][kUpN][4] = {};
    multiply<E, kWidth * kSize / 32, false, true>(
        out, {dz, kPanel, warp / 2 * 32}, {shared + Stage::kDown, 0, warp % 2 * (kChunk / 2)},
        no_shift);
    __syncthreads();  // dy has been multiplied
    const Fragment<E> place(warp / 2 * 32, warp % 2 * (kChunk / 2), kPanel);
#pragma unroll
    for (int i = 0; i < 4 * kUpN; ++i) {
      char* const at = dy + place(i / kUpN, i % kUpN);
      const float2 tail = load_pair<E>(at);
      const float* const value = out[i / kUpN / 2][i % kUpN] + i / kUpN % 2 * 2;
      store_pair<E>(at, value[0] + tail.x, value[1] + tail.y);
    }
    __syncthreads();
    const int row = first_row + step * kRows;
    store_chunk<E, E>(dy, last_row - row, chunk, p.dim, p.dx.aligned,
                      [&](int i) { return p.dx.data + row_offset(p, p.dx, row + i); });
  }

  store_products<E, kWidth>(p, p.partials[kDown], down, split, chunk, 0, p.dim);
  store_products<E, kWidth>(p, p.partials[kUp], up, split, chunk, 0, p.out_dim);
  if (chunk == 0 && threadIdx.x < p.width) {
    p.partials[kDown].sums[split * p.width + threadIdx.x] = dz_sum;
  }
  if (warp % 2 == 0 && lane % 4 == 0) {
    float* const to = p.partials[kUp].sums + int64_t(split) * p.dim;
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) {
      const int column = chunk * kChunk + warp / 2 * (kChunk / 2) + 8 * i + lane / 4;
      if (column < p.dim) to[column] = dy_sums[i / 2][i % 2 * 2];
    }
  }
}

}  // namespace fastadapters::cuda

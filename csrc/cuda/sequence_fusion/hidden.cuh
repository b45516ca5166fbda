// From dP to dz, dA and the gradient of the bias: backward's second part.
#pragma once

#include "factors.cuh"

namespace fastadapters::cuda::fusion {

// H of the tile, A and dP of kPart pairs (q, o), and sums over each warp's tokens.
template <class E>
struct HiddenLayout {
  static constexpr int kSize = sizeof(typename E::T);
  static constexpr int kStride = kPart * kLine;
  static constexpr int kTime = Hidden<E, kPart>::kBytes;
  static constexpr int kProducts = kTime + kRows * kSize / kLine * kStride;
  static constexpr int kSums = kProducts + Hidden<E, kPart>::kPanelCount * kStride;
  static constexpr int kBytes = kSums + 4 * kPart * 4;
};

// kRows tokens of an item. `parts` is how many column groups dP is the sum of; partial sums over
// the items of a group go on where it is not the first.
template <class E>
__device__ __forceinline__ void hidden_tile(const Problem& p, char* shared, int m, int tile,
                                            int item, int parts, int item_group, bool first_item) {
  using L = HiddenLayout<E>;
  constexpr int kSize = L::kSize, kN = kPart / 8;
  const Input& in = p.input[m];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, pair = lane % 4;
  const int first = tile * kRows, rows = counted(in, item) - first;
  const float no_shift[1][2] = {};
  char* const factor = shared + L::kTime;
  char* const products = shared + L::kProducts;
  float* const sums = reinterpret_cast<float*>(shared + L::kSums);

  for (int begin = 0; begin < in.padded; begin += kPart) {
    float z[1][kN][4] = {}, h[1][kN][4], dh[1][kN][4] = {}, slope[1][kN][4];
#pragma unroll
    for (int i = 0; i < 2 * kN; ++i) {
      const int row = 16 * warp + i % 2 * 8 + group, column = begin + i / 2 * 8 + 2 * pair;
      if (row >= rows) continue;
      const char* const from = in.z + (int64_t(item) * in.tokens + first + row) * in.width * kSize;
      const float2 v = load_two<E>(from, column, in.width - column, false);
      z[0][i / 2][i % 2 * 2] = v.x, z[0][i / 2][i % 2 * 2 + 1] = v.y;
    }
    // What does not count, or lies beyond r, is 0 whatever the activation makes of it.
#pragma unroll
    for (int i = 0; i < 4 * kN; ++i) slope[0][i / 4][i % 4] = 1;
    using Halves = float (&)[2][kN / 2][4];
    activate<true>(p.activation, reinterpret_cast<Halves>(z), reinterpret_cast<Halves>(h),
                   reinterpret_cast<Halves>(slope));
#pragma unroll
    for (int i = 0; i < 4 * kN; ++i) {
      const int row = 16 * warp + i % 4 / 2 * 8 + group;
      if (row >= rows || begin + i / 4 * 8 + 2 * pair + i % 2 >= in.width) {
        h[0][i / 4][i % 4] = slope[0][i / 4][i % 4] = 0;
      }
    }
    if (begin > 0) __syncthreads();
    const Fragment<E> place(16 * warp, 0, kPanel);
#pragma unroll
    for (int i = 0; i < 2 * kN; ++i) {
      constexpr int kPerPanel = kLine / (8 * kSize);
      store_pair<E>(shared + i / 2 / kPerPanel * kPanel + place(i % 2, i / 2 % kPerPanel),
                    h[0][i / 2][i % 2 * 2], h[0][i / 2][i % 2 * 2 + 1]);
    }

    for (int c = 0; c < p.factors() && rows > 0; c += kPart) {
      if (c > 0) __syncthreads();
      fill_time_factor<E>(factor, L::kStride, kPart, p, in, c, first, rows);
      fill_panels<E, kPart * kSize>(products, L::kStride, kPart, [&](int i, int j, auto& values) {
        if (c + i >= p.factors() || begin + j >= in.width) return;
        const int64_t apart = int64_t(p.items) * p.factors() * in.width;
        const int64_t at = (int64_t(item) * p.factors() + c + i) * in.width + begin + j;
#pragma unroll 4
        for (int part = 0; part < parts; ++part) {
          add_floats(values, in.d_products + at + part * apart, in.width - begin - j);
        }
      });
      __syncthreads();
      if (in.dz) {  // A dP
        multiply<E, kPart * kSize / 32, true, true>(dh, {factor, L::kStride, 16 * warp},
                                                    {products, L::kStride, 0}, no_shift);
      }
      if (in.d_time_factor) {  // dP H^T
        float sum[1][2][4];
        const auto each = [&](auto visit) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = c + i % 2 * 8 + group, token = 16 * warp + i / 2 * 8 + 2 * pair;
            if (row >= p.factors()) continue;
            visit(in.d_time_factor + (int64_t(item_group) * p.factors() + row) * in.tiles * kRows +
                      first + token,
                  sum[0][i / 2] + i % 2 * 2);
          }
        };
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[0][i / 4][i % 4] = 0;
        each([&](float* to, float* value) {
          const float2 v = load_two(to, 2, first_item && begin == 0);
          value[0] = v.x, value[1] = v.y;
        });
        multiply<E, kPart * kSize / 32, false, false>(sum, {products, L::kStride, 0},
                                                      {shared, kPanel, 16 * warp}, no_shift);
        each([&](float* to, float* value) { store_two(to, 2, value[0], value[1]); });
      }
    }
    if (in.d_time_factor && rows <= 0 && first_item && begin == 0) {
      for (int i = threadIdx.x; i < p.factors() * kRows; i += kThreads) {
        in.d_time_factor[(int64_t(item_group) * p.factors() + i / kRows) * in.tiles * kRows +
                         first + i % kRows] = 0;
      }
    }
    if (!in.dz) continue;

    float columns[kN][2] = {};
#pragma unroll
    for (int i = 0; i < 2 * kN; ++i) {
      const int row = 16 * warp + i % 2 * 8 + group, at = i % 2 * 2;
      float dz[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float s = slope[0][i / 2][at + e];
        dz[e] = s == 0 ? 0 : dh[0][i / 2][at + e] * s;
        columns[i / 2][e] += dz[e];
      }
      if (first + row < in.tokens) {
        char* const to =
            in.dz + ((int64_t(item) * in.tokens + first + row) * in.padded + begin) * kSize;
        store_pair<E>(to + (i / 2 * 8 + 2 * pair) * kSize, dz[0], dz[1]);
      }
    }
    if (!in.d_down_bias) continue;
#pragma unroll
    for (int i = 0; i < 2 * kN; ++i) {
      float& sum = columns[i / 2][i % 2];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
      if (group == 0) sums[warp * kPart + i / 2 * 8 + 2 * pair + i % 2] = sum;
    }
    __syncthreads();
    if (threadIdx.x < kPart) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += sums[i * kPart + threadIdx.x];
      float* const to = in.d_down_bias + (int64_t(item_group) * in.tiles + tile) * in.padded +
                        begin + threadIdx.x;
      *to = first_item ? sum : *to + sum;
    }
  }
}

// Backward's first two parts: by a launch each, or by one.
enum class BackwardHalf { factors, hidden, both };

struct BackwardPass : Problem {
  BackwardHalf half = BackwardHalf::both;
};

// Block (column group, row group, q) of factors, (tile of an item, item group) of hidden, item
// group of both.
template <class E>
__global__ void __launch_bounds__(kThreads, E::kTensorCore ? 3 : 2)
    backward(const __grid_constant__ BackwardPass p) {
  extern __shared__ __align__(128) char shared[];
  const bool both = p.half == BackwardHalf::both, hidden = p.half == BackwardHalf::hidden;
  const int items_group = both ? blockIdx.x : blockIdx.y;
  const int item = p.half == BackwardHalf::factors ? 0 : items_group * p.items_per_group;
  const int last_item =
      p.half == BackwardHalf::factors ? 1 : min(item + p.items_per_group, p.items);
  const int column_groups = both ? 1 : (p.dim - 1) / kTile / p.column_tiles_per_group + 1;
  const int column = both ? 0 : blockIdx.x * p.column_tiles_per_group * kTile;
  const int last_column = both ? p.dim : min(column + p.column_tiles_per_group * kTile, p.dim);
  const int group_rows = p.row_tiles_per_group * kTile;
  const int tile = hidden ? blockIdx.x : 0;
  const int last_tile = both ? p.tiles : tile + hidden;
#pragma unroll 1
  for (int i = item; i < last_item; ++i) {
    const int row = both ? i * p.out_len : blockIdx.y * group_rows;
    const int end = both ? row + p.out_len : p.items * p.out_len;
    const int last_row = both ? end : min(row + group_rows, end);
    const int first_q = both ? 0 : blockIdx.z;
    const int last_q = both ? p.rank : first_q + !hidden;
#pragma unroll 1
    for (int q = first_q; q < last_q; ++q) {
#pragma unroll 1
      for (int j = row; j < last_row; j += kTile) {
#pragma unroll 1
        for (int k = column; k < last_column; k += kTile) {
          factor_tile<E>(p, shared, q, j, end, k, items_group, i == item && j == row,
                         both ? 0 : blockIdx.x, k == column);
          __syncthreads();
        }
      }
    }
#pragma unroll 1
    for (int j = tile; j < last_tile; ++j) {
      int of_modality = j;
      const int m = modality_of(p, &of_modality);
      if (!p.input[m].d_products) continue;
      hidden_tile<E>(p, shared, m, of_modality, i, column_groups, items_group, i == item);
      __syncthreads();
    }
  }
}

}  // namespace fastadapters::cuda::fusion

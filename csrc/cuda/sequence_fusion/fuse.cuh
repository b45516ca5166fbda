// From P to y: forward's second part.
#pragma once

#include "down.cuh"

namespace fastadapters::cuda::fusion {

// A step of a tile of kTile rows (b, o) and columns of y: kPart columns of P_mq, and the rows of
// U_mq that they meet. Four warps in a 2 x 2 grid over the tile.
template <class E>
struct Step {
  static constexpr int kSize = sizeof(typename E::T);
  static constexpr int kStride = kTile * kLine;  // of the panel of P
  static constexpr int kBytes = kStride + kPart * kLine;
};

// The parts that the widths of all modalities are cut into, one after the other.
struct Parts {
  int m = 0, begin = 0;

  __device__ __forceinline__ bool last(const Problem& p) const {
    return begin + kPart >= p.input[m].width;
  }
  __device__ __forceinline__ void next(const Problem& p) {
    begin += kPart;
    if (begin >= p.input[m].width) begin = 0, ++m;
  }
  __device__ __forceinline__ void previous(const Problem& p) {
    if (begin == 0 && --m >= 0) begin = (p.input[m].width + kPart - 1) / kPart * kPart;
    begin -= kPart;
  }
};

// Rows [first, last) of all B T_o. read(in, row, at, values) gives elements of row `at` of P_m.
template <class E, class Read>
__device__ __forceinline__ void fill_step(const Problem& p, char* step, Parts part, int q,
                                          int first, int last, int column, Read read) {
  using L = Step<E>;
  const Input& in = p.input[part.m];
  fill_panels<E, kPart * L::kSize>(step, L::kStride, kTile, [&](int i, int j, auto& values) {
    const int row = first + i;
    if (row >= last || part.begin + j >= in.width) return;
    const int item = row / p.out_len, o = row % p.out_len;
    const int64_t at = (int64_t(item) * p.rank + q) * p.out_len + o;
    read(in, item, at * in.width + part.begin + j, in.width - part.begin - j, values);
  });
  const int row = q * in.width;
  fill_parameter<E, kTile * L::kSize>(step + L::kStride, 0, kPart, in.feature_factor,
                                      row + in.width, p.dim, p.feature_copies,
                                      int64_t(in.width) * p.dim, row + part.begin, column);
}

// Columns and rows of the tile's F += P U, over one part.
template <class E>
__device__ __forceinline__ void expand(float (&sum)[1][2][4], const char* step) {
  using L = Step<E>;
  const int warp = threadIdx.x / 32;
  const float no_shift[1][2] = {};
  multiply<E, kPart * L::kSize / 32, false, true>(sum, {step, L::kStride, warp / 2 * 16},
                                                  {step + L::kStride, 0, warp % 2 * 16}, no_shift);
}

// Where accumulators [n][2 i] and [2 i + 1] are in a tile of y.
struct Place {
  int row, column;

  __device__ __forceinline__ Place(int first, int first_column, int n, int i)
      : row(first + threadIdx.x / 64 * 16 + 8 * i + threadIdx.x % 32 / 4),
        column(first_column + threadIdx.x / 32 % 2 * 16 + 8 * n + threadIdx.x % 4 * 2) {}
};

template <class E>
__device__ __forceinline__ void fuse_tile(const Problem& p, char* shared, int first, int last,
                                          int column) {
  using L = Step<E>;
  // P is the sum of its tiles of tokens; the blocks of the first columns save it.
  const auto read = [&](const Input& in, int item, int64_t at, int valid, auto& values) {
    const int tiles = (counted(in, item) + kRows - 1) / kRows;
    const int64_t apart = int64_t(p.items) * p.factors() * in.width;
#pragma unroll 4
    for (int tile = 0; tile < tiles; ++tile) {
      add_floats(values, in.partials + at + tile * apart, valid);
    }
    if (in.products && column == 0) {
#pragma unroll
      for (int e = 0; e < int(sizeof(values) / 4); ++e) {
        if (e < valid) in.products[at + e] = values[e];
      }
    }
  };

  float y[2][4] = {};
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Place at(first, column, n, i);
      if (at.row >= last) continue;
      const int item = at.row / p.out_len, o = at.row % p.out_len;
      const char* const row = p.add_leading     ? leading_row(p, item, o)
                              : p.residual.data ? p.residual.data + item * p.residual.strides[1] +
                                                      o * p.residual.strides[2]
                                                : nullptr;
      if (!row) continue;
      const float2 v = load_two<E>(row, at.column, p.dim - at.column, p.wide_out);
      y[n][2 * i] = v.x, y[n][2 * i + 1] = v.y;
    }
  }

  int buffer = 0;
  fill_step<E>(p, shared, {}, 0, first, last, column, read);
  for (int q = 0; q < p.rank; ++q) {
    float product[2][4], factor[1][2][4] = {};
    for (Parts part; part.m < p.modalities;) {
      __syncthreads();
      const char* const step = shared + buffer * L::kBytes;
      buffer ^= 1;
      Parts following = part;
      following.next(p);
      const bool wrap = following.m == p.modalities;
      if (!wrap || q + 1 < p.rank) {
        fill_step<E>(p, shared + buffer * L::kBytes, wrap ? Parts{} : following, q + wrap, first,
                     last, column, read);
      }
      expand<E>(factor, step);
      if (part.last(p)) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& f = factor[0][i / 4][i % 4];
          product[i / 4][i % 4] = part.m == 0 ? f : product[i / 4][i % 4] * f;
          f = 0;
        }
      }
      part = following;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i / 4][i % 4] += product[i / 4][i % 4];
  }

#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Place at(first, column, n, i);
      if (at.row >= last) continue;
      char* const row = p.out.data + at.row / p.out_len * p.out.strides[1] +
                        at.row % p.out_len * p.out.strides[2];
      store_two<E>(row, at.column, p.dim - at.column, p.wide_out, y[n][2 * i], y[n][2 * i + 1]);
    }
  }
}

// Both parts of forward: by a launch each, or by one, with a block for each item.
enum class Half { down, fuse, both };

struct ForwardPass : Problem {
  Half half = Half::both;
};

template <class E>
__global__ void __launch_bounds__(kThreads, 4) forward(const __grid_constant__ ForwardPass p) {
  extern __shared__ __align__(128) char shared[];
  const bool both = p.half == Half::both, down = p.half == Half::down;
  const int item = down ? blockIdx.x / p.tiles : blockIdx.x;
  const int tile = down ? blockIdx.x % p.tiles : 0;
  const int last_tile = both ? p.tiles : down ? tile + 1 : 0;
#pragma unroll 1
  for (int i = tile; i < last_tile; ++i) {
    down_item_tile<E, kPart>(p, shared, item, i);
    __syncthreads();
  }
  if (down) return;
  const int row = both ? item * p.out_len : blockIdx.x * kTile;
  const int last_row = both ? row + p.out_len : min(row + kTile, p.items * p.out_len);
  const int column = both ? 0 : blockIdx.y * kTile;
  const int last_column = both ? p.dim : column + kTile;
#pragma unroll 1
  for (int i = row; i < last_row; i += kTile) {
#pragma unroll 1
    for (int j = column; j < last_column; j += kTile) {
      fuse_tile<E>(p, shared, i, last_row, j);
      __syncthreads();
    }
  }
}

}  // namespace fastadapters::cuda::fusion

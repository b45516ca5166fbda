// What every kernel of the bottleneck is told.
#pragma once

#include "../../bottleneck.h"
#include "../tensors.cuh"
#include "dropout.cuh"
#include "groups.cuh"

namespace fastadapters::cuda {

struct Problem {
  int rows = 0, middle = 1, inner = 1;        // M, and the sizes of the inner row dimensions
  int dim = 0, out_dim = 0, bottleneck = 0;   // D_in, D_out, r
  int chunks = 0, out_chunks = 0, parts = 0;  // of D_in, of D_out and of r
  int width = 0;  // columns of h and dz as they are kept, zeros beyond r
  Activations x;
  Matrix down, up;  // in backward `up` may be diag(s) Wu
  Vector down_bias;
  // LayerNorm is folded into what it is followed by: `down` is Wd diag(gamma), of whose rows these
  // are the sums [r], `down_bias` is bd + Wd beta. It is not where input dropout comes between.
  bool norm = false;
  const float* down_sums = nullptr;
  Vector norm_weight, norm_bias;
  Vector up_bias, scale;
  bool channel_scale = false;
  float scale_value = 1, norm_eps = 0;
  Activation activation = Activation::identity;
  Dropout input_dropout, dropout;  // of norm(x) and of h
  float2* stats = nullptr;         // [M]
  // Grouped rows: see groups.cuh. What is kept for each row, stats, z, h and dz, is in the order of
  // their places; parameters are stacks.
  const int* order = nullptr;
  const Run* tiles = nullptr;
  const Run* splits = nullptr;
};

// A tile of the data pass.
template <bool kGrouped>
__device__ __forceinline__ Run tile_at(const Problem& p, int tile) {
  return kGrouped ? p.tiles[tile] : Run{tile * kRows, min(p.rows - tile * kRows, kRows), 0};
}

// The row at a place, of those before `end`.
template <bool kGrouped>
__device__ __forceinline__ int row_at(const Problem& p, int place, int end) {
  return kGrouped ? p.order[min(place, end - 1)] : place;
}

// Rows of no adapter, which start at `rows`.
template <class S>
__device__ __forceinline__ void fill_with_nan(char* data, const int64_t* rows, int count,
                                              int columns) {
  for (int row = 0; row < count; ++row) {
    auto* const to = reinterpret_cast<typename S::T*>(data + rows[row]);
    for (int d = threadIdx.x; d < columns; d += kThreads) to[d] = typename S::T(NAN);
  }
}

// LayerNorm that is not folded, on elements side by side of a row; zeros from D_in on.
template <class E, int kN>
__device__ __forceinline__ void normalise(const Problem& p, float (&v)[kN], float2 stats,
                                          int column, int adapter) {
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const int d = column + i;
    if (d < p.dim) {
      const int at = adapter * p.dim + d;
      const float beta = p.norm_bias.data ? load<E>(p.norm_bias, at) : 0;
      v[i] = (v[i] - stats.x) * stats.y * load<E>(p.norm_weight, at) + beta;
    }
  }
}

// An element of a parameter, or `otherwise` where there is none.
template <class E>
__device__ __forceinline__ float element(const Parameter& v, int64_t i, float otherwise,
                                         bool exact = false) {
  return v.data ? load<E>({v.data, v.dtype, exact}, i) : otherwise;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
  return value;
}

__device__ __forceinline__ int64_t row_offset(const Problem& p, const Activations& t, int row) {
  if (t.uniform) return row * t.strides[2];
  const int outer = row / p.inner, first = outer / p.middle;
  return first * t.strides[0] + (outer - first * p.middle) * t.strides[1] +
         (row - outer * p.inner) * t.strides[2];
}

}  // namespace fastadapters::cuda

// Products of small matrices in fp32, many in one launch.
#pragma once

#include "scalars.cuh"

namespace fastadapters::cuda::head {

constexpr int kThreads = 128;
constexpr int kTileM = 32, kTileN = 64, kDepth = 32;  // of a block, and of a step of its sum
constexpr int kStrideM = kTileM + 4, kStrideN = kTileN + 4;
constexpr int kStep = kDepth * (kStrideM + kStrideN);

// A matrix [rows, columns] in memory; its rows, or if `transposed` its columns, are those of the
// result. Column `columns` may be a vector of its own, or ones; all else outside is 0, and inside
// too without `data`.
struct Operand {
  const void* data = nullptr;
  const void* column = nullptr;
  int64_t batch = 0;  // from one matrix to the next, elements
  int rows = 0, columns = 0, stride = 0;
  Dtype dtype = Dtype::float32, column_dtype = Dtype::float32;
  bool transposed = false, ones = false;
};

struct Segment {
  Operand left, right;
  int depth = 0;  // of the sum
};

// out[m, n] = sum over the segments of left[m, k] right[n, k], and what `finish` adds to it. Column
// n of the result goes to `tail`; from n to `stored`, out gets zeros. With several splits, each
// sums its part of the segments to a slab of its own.
struct Product {
  Segment segments[4];
  int parts = 0;  // segments there are
  int m = 0, n = 0, stored = 0, batches = 1, splits = 1;
  Parameter out, tail;
  int out_stride = 0;
  int64_t out_batch = 0, out_slab = 0, tail_batch = 0, tail_slab = 0;
  Parameter bias;  // [n], or with `bias_by_row` [m]
  int64_t bias_batch = 0;
  int bias_size = INT32_MAX;  // beyond it there is none
  bool bias_by_row = false;
  float bias_scale = 1, constant = 0;
  const float* row_scale = nullptr;  // [m]
  int scaled_columns = 0;            // the first ones, times
  float column_scale = 1;
  Operand addend;                       // [m, n], times
  const float* addend_scale = nullptr;  // [m], or 1
  float* active = nullptr;              // [m, n] like out: its activation
  const float* slope_at = nullptr;      // times the activation's slope here
  Activation activation = Activation::identity;
};

// kTile rows of the result by kDepth of the sum, as registers.
template <int kTile>
__device__ __forceinline__ void fetch(float (&to)[kTile / 4], const Operand& o, int batch,
                                      int first, int depth) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kAcross = kTile / 32;
  // Element i is `rows(i)` below and `columns(i)` right of the first.
  const int row = o.transposed ? depth + warp : first + lane / 8 + 4 * warp;
  const int column = o.transposed ? first + lane : depth + lane % 8;
  const auto rows = [&](int i) { return o.transposed ? 4 * (i / kAcross) : 16 * (i / 4); };
  const auto columns = [&](int i) { return o.transposed ? 32 * (i % kAcross) : 8 * (i % 4); };
  const int end_row = o.transposed ? depth + kDepth : first + kTile;
  const int end_column = o.transposed ? first + kTile : depth + kDepth;
  const bool inside = o.data && end_row <= o.rows && end_column <= o.columns;
  if (!inside) {
#pragma unroll
    for (int i = 0; i < kTile / 4; ++i) {
      const int r = row + rows(i), c = column + columns(i);
      to[i] = 0;
      if (r >= o.rows || c > o.columns) continue;
      if (c < o.columns) {
        if (o.data) to[i] = load(o.data, o.dtype, batch * o.batch + int64_t(r) * o.stride + c);
      } else if (o.column) {
        to[i] = load(o.column, o.column_dtype, r);
      } else if (o.ones) {
        to[i] = 1;
      }
    }
    return;
  }
  const auto fill = [&](auto element) {
    const auto* const at = static_cast<const decltype(element)*>(o.data) + batch * o.batch +
                           int64_t(row) * o.stride + column;
#pragma unroll
    for (int i = 0; i < kTile / 4; ++i) to[i] = float(at[rows(i) * int64_t(o.stride) + columns(i)]);
  };
  switch (o.dtype) {
    case Dtype::float32:
      return fill(float{});
    case Dtype::bfloat16:
      return fill(__nv_bfloat16{});
    default:
      return fill(__half{});
  }
}

// ... to shared memory, one row for each value of the summed index.
template <int kTile>
__device__ __forceinline__ void put(float* tile, const float (&from)[kTile / 4], bool transposed) {
  constexpr int kAcross = kTile / 32, kStride = kTile + 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kTile / 4; ++i) {
    const int k = transposed ? warp + 4 * (i / kAcross) : lane % 8 + 8 * (i % 4);
    const int at = transposed ? lane + 32 * (i % kAcross) : lane / 8 + 4 * warp + 16 * (i / 4);
    tile[k * kStride + at] = from[i];
  }
}

// acc += left right over one step. The step has sums of its own: short chains of additions make
// small errors.
__device__ __forceinline__ void multiply_add(float (&acc)[4][4], const float* left,
                                             const float* right) {
  float sums[4][4] = {};
#pragma unroll 8
  for (int k = 0; k < kDepth; ++k) {
    const float4 a = *reinterpret_cast<const float4*>(left + k * kStrideM);
    const float4 b = *reinterpret_cast<const float4*>(right + k * kStrideN);
    outer(sums, a, b);
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) acc[i / 4][i % 4] += sums[i / 4][i % 4];
}

__host__ __device__ inline int columns_of(const Product& p) {
  const int columns = p.n + (p.tail.data != nullptr);
  return columns > p.stored ? columns : p.stored;
}

__host__ __device__ inline int tiles_of(const Product& p) {
  return p.splits * p.batches * ((p.m + kTileM - 1) / kTileM) *
         ((columns_of(p) + kTileN - 1) / kTileN);
}

__device__ __forceinline__ void finish(const Product& p, int batch, int split, int m, int n,
                                       float value) {
  const int of_bias = p.bias_by_row ? m : n;
  if (n < p.n && p.bias.data && of_bias < p.bias_size) {
    value =
        fmaf(load(p.bias.data, p.bias.dtype, batch * p.bias_batch + of_bias), p.bias_scale, value);
  }
  value += p.constant;
  if (p.row_scale) value *= p.row_scale[m];
  if (n < p.scaled_columns) value *= p.column_scale;
  if (n >= p.n) {
    if (n == p.n && p.tail.data) {
      store(p.tail, split * p.tail_slab + batch * p.tail_batch + m, value);
    }
    value = 0;
    if (n >= p.stored) return;
  }
  if (p.addend.data) {
    const float more = load(p.addend.data, p.addend.dtype, int64_t(m) * p.addend.stride + n);
    value = fmaf(p.addend_scale ? p.addend_scale[m] : 1, more, value);
  }
  const int64_t at = split * p.out_slab + batch * p.out_batch + int64_t(m) * p.out_stride + n;
  if (p.slope_at) value *= activate(p.activation, p.slope_at[at]).y;
  store(p.out, at, value);
  if (p.active) p.active[at] = activate(p.activation, value).x;
}

// `shared`: 2 kStep floats.
__device__ inline void multiply(const Product& p, int tile, float* shared) {
  const int columns = columns_of(p), across = (columns + kTileN - 1) / kTileN;
  const int n0 = tile % across * kTileN;
  tile /= across;
  const int down = (p.m + kTileM - 1) / kTileM, m0 = tile % down * kTileM;
  tile /= down;
  const int batch = tile % p.batches, split = tile / p.batches;
  const auto steps_of = [&](int part) { return (p.segments[part].depth + kDepth - 1) / kDepth; };
  int steps = 0;
  for (int i = 0; i < p.parts; ++i) steps += steps_of(i);
  const int begin = int(int64_t(steps) * split / p.splits);
  const int end = int(int64_t(steps) * (split + 1) / p.splits);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / 2 * 16 + lane / 8 * 4, column = warp % 2 * 32 + lane % 8 * 4;
  const bool inside = m0 + warp / 2 * 16 < p.m && n0 + warp % 2 * 32 < columns;
  float acc[4][4] = {}, a[kTileM / 4], b[kTileN / 4];
  int part = 0, step = begin;
  const auto enter = [&] {  // the segment that the step is in
    while (part < p.parts && step >= steps_of(part)) step -= steps_of(part++);
  };
  enter();
  for (int i = begin - 1; i < end; ++i) {
    float* const left = shared + (i - begin & 1) * kStep;
    float* const right = left + kDepth * kStrideM;
    if (i >= begin) {
      put<kTileM>(left, a, p.segments[part].left.transposed);
      put<kTileN>(right, b, p.segments[part].right.transposed);
      __syncthreads();
      ++step;
      enter();
    }
    if (i + 1 < end) {
      const Segment& s = p.segments[part];
      fetch<kTileM>(a, s.left, batch, m0, step * kDepth);
      fetch<kTileN>(b, s.right, batch, n0, step * kDepth);
    }
    if (i >= begin && inside) multiply_add(acc, left + row, right + column);
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int m = m0 + row + i / 4, n = n0 + column + i % 4;
    if (m < p.m && n < columns) finish(p, batch, split, m, n, acc[i / 4][i % 4]);
  }
}

}  // namespace fastadapters::cuda::head

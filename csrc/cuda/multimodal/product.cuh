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

// out[m, n] = sum over the segments of left[m, k] right[n, k], and what `finish` adds to it; from n
// to `stored`, out gets zeros. `tail`: one column more, of left times the columns of their own that
// the (transposed) right matrices have. With several splits, each sums its part of the segments to
// a slab of its own.
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

// Of row r and column c.
__device__ __forceinline__ float element(const Operand& o, int batch, int r, int c) {
  if (r >= o.rows || c > o.columns) return 0;
  if (c == o.columns) return o.column ? load(o.column, o.column_dtype, r) : o.ones;
  return o.data ? load(o.data, o.dtype, batch * o.batch + int64_t(r) * o.stride + c) : 0;
}

// f(a pointer to data[first]), of its type.
template <class F>
__device__ __forceinline__ void with_type(const Operand& o, int64_t first, F f) {
  switch (o.dtype) {
    case Dtype::float32:
      return f(static_cast<const float*>(o.data) + first);
    case Dtype::bfloat16:
      return f(static_cast<const __nv_bfloat16*>(o.data) + first);
    default:
      return f(static_cast<const __half*>(o.data) + first);
  }
}

// Which elements of kTile rows of the result by kDepth of the sum a thread has: element i is
// `down(i)` below and `right(i)` right of the first.
template <int kTile, bool kTransposed>
struct Elements {
  static constexpr int kAcross = kTile / 32, kStride = kTile + 4;
  int row = kTransposed ? threadIdx.x / 32 : threadIdx.x % 32 / 8 + 4 * (threadIdx.x / 32);
  int column = kTransposed ? threadIdx.x % 32 : threadIdx.x % 8;

  __device__ static constexpr int down(int i) {
    return kTransposed ? 4 * (i / kAcross) : 16 * (i / 4);
  }
  __device__ static constexpr int right(int i) {
    return kTransposed ? 32 * (i % kAcross) : 8 * (i % 4);
  }
};

template <int kTile, bool kTransposed>
__device__ __forceinline__ void copy(float (&to)[kTile / 4], const Operand& o, int batch, int row,
                                     int column) {
  const Elements<kTile, kTransposed> at;
  row += at.row, column += at.column;
  with_type(o, batch * o.batch + int64_t(row) * o.stride + column, [&](auto* from) {
#pragma unroll
    for (int i = 0; i < kTile / 4; ++i) {
      if (i > 0) from += (at.down(i) - at.down(i - 1)) * int64_t(o.stride);
      to[i] = float(from[at.right(i)]);
    }
  });
}

// kTile rows of the result by kDepth of the sum, as registers ...
template <int kTile>
__device__ __forceinline__ void fetch(float (&to)[kTile / 4], const Operand& o, int batch,
                                      int first, int depth) {
  const int row = o.transposed ? depth : first, column = o.transposed ? first : depth;
  const int rows = o.transposed ? kDepth : kTile, columns = o.transposed ? kTile : kDepth;
  if (o.data && row + rows <= o.rows && column + columns <= o.columns) {
    if (o.transposed) return copy<kTile, true>(to, o, batch, row, column);
    return copy<kTile, false>(to, o, batch, row, column);
  }
  const Elements<kTile, true> across;
  const Elements<kTile, false> along;
#pragma unroll
  for (int i = 0; i < kTile / 4; ++i) {
    to[i] = element(
        o, batch, row + (o.transposed ? across.row + across.down(i) : along.row + along.down(i)),
        column + (o.transposed ? across.column + across.right(i) : along.column + along.right(i)));
  }
}

template <int kTile, bool kTransposed>
__device__ __forceinline__ void put(float* tile, const float (&from)[kTile / 4]) {
  const Elements<kTile, kTransposed> at;
  const int k = kTransposed ? at.row : at.column;
  tile += k * at.kStride + (kTransposed ? at.column : at.row);
#pragma unroll
  for (int i = 0; i < kTile / 4; ++i) {
    tile[kTransposed ? at.down(i) * at.kStride + at.right(i)
                     : at.right(i) * at.kStride + at.down(i)] = from[i];
  }
}

// ... and in shared memory, one row for each value of the summed index.
template <int kTile>
__device__ __forceinline__ void put(float* tile, const float (&from)[kTile / 4], bool transposed) {
  if (transposed) return put<kTile, true>(tile, from);
  put<kTile, false>(tile, from);
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
  return p.n > p.stored ? p.n : p.stored;
}

// Tiles of 32 rows: of the product of a split and a batch, and one for the tail.
__host__ __device__ inline int tiles_across(const Product& p) {
  return (columns_of(p) + kTileN - 1) / kTileN + (p.tail.data != nullptr);
}

__host__ __device__ inline int tiles_of(const Product& p) {
  return p.splits * p.batches * ((p.m + kTileM - 1) / kTileM) * tiles_across(p);
}

// Where a tile is, and which steps of the sum, over all segments, it takes.
struct Tile {
  int across, m0, batch, split, begin, end;

  __device__ Tile(const Product& p, int tile) {
    const int width = tiles_across(p), down = (p.m + kTileM - 1) / kTileM;
    across = tile % width, tile /= width;
    m0 = tile % down * kTileM, tile /= down;
    batch = tile % p.batches, split = tile / p.batches;
    int64_t steps = 0;
    for (int i = 0; i < p.parts; ++i) steps += steps_of(p, i);
    begin = int(steps * split / p.splits);
    end = int(steps * (split + 1) / p.splits);
  }
  __device__ static int steps_of(const Product& p, int part) {
    return (p.segments[part].depth + kDepth - 1) / kDepth;
  }
  // From the first step of all segments to that of the segment it is in.
  __device__ static void enter(const Product& p, int* part, int* step) {
    while (*part < p.parts && *step >= steps_of(p, *part)) *step -= steps_of(p, (*part)++);
  }
};

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
  if (n >= p.n) value = 0;
  if (p.addend.data) {
    const float more = load(p.addend.data, p.addend.dtype, int64_t(m) * p.addend.stride + n);
    value = fmaf(p.addend_scale ? p.addend_scale[m] : 1, more, value);
  }
  const int64_t at = split * p.out_slab + batch * p.out_batch + int64_t(m) * p.out_stride + n;
  if (p.slope_at) value *= activate(p.activation, p.slope_at[at]).y;
  store(p.out, at, value);
  if (p.active) p.active[at] = activate(p.activation, value).x;
}

// A lane has a row of the tail, a warp every fourth step.
__device__ inline void multiply_tail(const Product& p, const Tile& tile, float* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, m = tile.m0 + lane;
  float acc = 0;
  for (int at = tile.begin + warp; at < tile.end; at += kThreads / 32) {
    int part = 0, step = at;
    Tile::enter(p, &part, &step);
    const Operand &left = p.segments[part].left, &right = p.segments[part].right;
    const int k0 = step * kDepth;
    const float factors = element(right, tile.batch, k0 + lane, right.columns);
    const int rows = left.transposed ? left.columns : left.rows;
    const int columns = left.transposed ? left.rows : left.columns;
    float sum = 0;
    if (left.data && k0 + kDepth <= columns && tile.m0 + kTileM <= rows) {
      const int64_t next = left.transposed ? left.stride : 1;
      const int64_t row = left.transposed ? m : int64_t(m) * left.stride;
      with_type(left, tile.batch * left.batch + row + k0 * next, [&](const auto* from) {
#pragma unroll 8
        for (int k = 0; k < kDepth; ++k) {
          sum = fmaf(float(from[k * next]), __shfl_sync(0xffffffff, factors, k), sum);
        }
      });
    } else {
      for (int k = 0; k < kDepth; ++k) {
        const float value = left.transposed ? element(left, tile.batch, k0 + k, m)
                                            : element(left, tile.batch, m, k0 + k);
        sum = fmaf(value, __shfl_sync(0xffffffff, factors, k), sum);
      }
    }
    acc += sum;
  }
  shared[threadIdx.x] = acc;
  __syncthreads();
  if (warp > 0 || m >= p.m) return;
  acc = shared[lane] + shared[32 + lane] + shared[64 + lane] + shared[96 + lane];
  if (p.row_scale) acc *= p.row_scale[m];
  store(p.tail, tile.split * p.tail_slab + tile.batch * p.tail_batch + m, acc);
}

// `shared`: 2 kStep floats.
__device__ inline void multiply(const Product& p, int block, float* shared) {
  const Tile tile(p, block);
  const int columns = columns_of(p), n0 = tile.across * kTileN, m0 = tile.m0;
  if (n0 >= columns) return multiply_tail(p, tile, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / 2 * 16 + lane / 8 * 4, column = warp % 2 * 32 + lane % 8 * 4;
  const bool inside = m0 + warp / 2 * 16 < p.m && n0 + warp % 2 * 32 < columns;
  float acc[4][4] = {}, a[kTileM / 4], b[kTileN / 4];
  int part = 0, step = tile.begin;
  Tile::enter(p, &part, &step);
  for (int i = tile.begin - 1; i < tile.end; ++i) {
    float* const left = shared + (i - tile.begin & 1) * kStep;
    float* const right = left + kDepth * kStrideM;
    if (i >= tile.begin) {
      put<kTileM>(left, a, p.segments[part].left.transposed);
      put<kTileN>(right, b, p.segments[part].right.transposed);
      __syncthreads();
      ++step;
      Tile::enter(p, &part, &step);
    }
    if (i + 1 < tile.end) {
      const Segment& s = p.segments[part];
      fetch<kTileM>(a, s.left, tile.batch, m0, step * kDepth);
      fetch<kTileN>(b, s.right, tile.batch, n0, step * kDepth);
    }
    if (i >= tile.begin && inside) multiply_add(acc, left + row, right + column);
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int m = m0 + row + i / 4, n = n0 + column + i % 4;
    if (m < p.m && n < columns) finish(p, tile.batch, tile.split, m, n, acc[i / 4][i % 4]);
  }
}

}  // namespace fastadapters::cuda::head

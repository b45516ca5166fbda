// Attention of all queries, texts and items, over the texts, head by head, never with the scores in
// memory.
//
// A block has 32 rows (queries, in backward also keys) and 32 of the head's d to sum. Its warps
// walk over the other side, each with every fourth tile of 32 to itself, and meet only at the end,
// when what they have is added up. Along d, tiles follow each other by 32.
//
// A tile lies row by row. Lane 4 g + l has rows g, g + 8, g + 16, g + 24 of the block; of a tile of
// scores the columns l, l + 4, ..., l + 28, of the result 8 l to 8 l + 7.
#pragma once

#include "../ptx.cuh"
#include "problem.cuh"
#include "product.cuh"

namespace fastadapters::cuda::head {

constexpr int kRows = 32, kRowStride = kRows + 4, kTile = kRows * kRowStride;
constexpr int kWarpTiles = 3;  // of each warp: two that stream, and the weights
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

struct AttentionForward {
  Problem p;
  int first, end;  // queries
};

__device__ __forceinline__ float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ void copy_number(float* to, const float* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(to)),
               "l"(from), "r"(there ? 4 : 0)
               : "memory");
}

// One head's part of [rows, E] within a wider matrix.
struct Side {
  const float* data;
  int stride, count, depth;
};

// to[row, k] = rows first.., columns begin.. of `side`, zeros outside: by kBy threads.
template <int kBy>
__device__ __forceinline__ void bring(float* to, const Side& side, int first, int begin) {
  const int thread = threadIdx.x % kBy;
  if (side.depth % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kRows * 8 / kBy; ++i) {
      const int row = thread / 8 + i * (kBy / 8), k = thread % 8 * 4;
      const bool there = first + row < side.count && begin + k < side.depth;
      const float* const from = side.data + int64_t(first + row) * side.stride + begin + k;
      copy_async(to + row * kRowStride + k, there ? from : side.data, there ? 16 : 0);
    }
    return;
  }
#pragma unroll 4
  for (int i = 0; i < kRows * 32 / kBy; ++i) {
    const int row = thread / 32 + i * (kBy / 32), k = thread % 32;
    const bool there = first + row < side.count && begin + k < side.depth;
    const float* const from = side.data + int64_t(first + row) * side.stride + begin + k;
    copy_number(to + row * kRowStride + k, there ? from : side.data, there);
  }
}

__device__ __forceinline__ void load4(float* to, const float* from) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

__device__ __forceinline__ void store8(float* to, const float (&from)[8]) {
  reinterpret_cast<float4*>(to)[0] = {from[0], from[1], from[2], from[3]};
  reinterpret_cast<float4*>(to)[1] = {from[4], from[5], from[6], from[7]};
}

// acc[4 rows, 8 columns] += left right^T along 32 of d.
__device__ __forceinline__ void multiply_heads(float (&acc)[4][8], const float* left,
                                               const float* right) {
#pragma unroll 2
  for (int k = 0; k < kDepth; k += 4) {
    float a[4][4], b[8][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) load4(a[i], left + 8 * i * kRowStride + k);
#pragma unroll
    for (int j = 0; j < 8; ++j) load4(b[j], right + 4 * j * kRowStride + k);
#pragma unroll
    for (int i = 0; i < 4 * 32; ++i) {
      float& to = acc[i / 8 % 4][i % 8];
      to = fmaf(a[i / 8 % 4][i / 32], b[i % 8][i / 32], to);
    }
  }
}

// A lane's weights of its rows, side by side: column 8 l + j has the weight of l + 4 j.
__device__ __forceinline__ void put_weights(float* weights, const float (&from)[4][8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) store8(weights + 8 * i * kRowStride, from[i]);
}

// sum[4 rows, 8 columns] = weights values, of one tile: short chains of additions make small
// errors.
__device__ __forceinline__ void average(float (&sum)[4][8], const float* weights,
                                        const float* values) {
#pragma unroll
  for (int i = 0; i < 32; ++i) sum[i / 8][i % 8] = 0;
#pragma unroll 1
  for (int l = 0; l < 4; ++l) {
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      float w[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) load4(w[i], weights + 8 * i * kRowStride + 8 * l + j);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float v[8];
        const float* const row = values + (l + 4 * (j + e)) * kRowStride;
        load4(v, row), load4(v + 4, row + 4);
#pragma unroll
        for (int i = 0; i < 32; ++i)
          sum[i / 8][i % 8] = fmaf(w[i / 8][e], v[i % 8], sum[i / 8][i % 8]);
      }
    }
  }
}

// Over the four lanes that share rows.
__device__ __forceinline__ float row_sum(float value) {
  value += __shfl_xor_sync(0xffffffff, value, 1);
  return value + __shfl_xor_sync(0xffffffff, value, 2);
}

inline int parts_of(int depth) { return (depth + kDepth - 1) / kDepth; }

// Bytes of shared memory: resident rows, the warps' tiles, and two numbers of a row and warp.
inline int shared_bytes(int residents, int depth) {
  const int tiles = residents * parts_of(depth) + kThreads / 32 * kWarpTiles;
  return 4 * (tiles * kTile + kThreads / 32 * 2 * kRows);
}

__global__ void __launch_bounds__(kThreads) attend(const __grid_constant__ AttentionForward a) {
  extern __shared__ __align__(16) float shared[];
  const Problem& p = a.p;
  const int head = blockIdx.y, columns = blockIdx.z * kDepth, parts = gridDim.z;
  const int first = a.first + blockIdx.x * kRows;
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, l = threadIdx.x % 4;
  const auto side = [&](int part, int count) {
    return Side{p.s.y + part * p.width + head * p.depth, 3 * p.width, count, p.depth};
  };
  const Side q = side(0, a.end), k = side(1, p.texts), v = side(2, p.texts);

  float* const keys = shared + (parts + warp * kWarpTiles) * kTile;
  float* const values = keys + kTile;
  float* const weights = values + kTile;
  float* const numbers = shared + (parts + kThreads / 32 * kWarpTiles) * kTile;
  const int steps = ((p.texts + kRows - 1) / kRows - warp + 3) / 4 * parts;
  const auto key_of = [&](int step) { return (step / parts * 4 + warp) * kRows; };
  const auto bring_keys = [&](int step) {
    if (step < steps) bring<32>(keys, k, key_of(step), step % parts * kDepth);
    copy_commit();
  };
  const auto bring_values = [&](int step) {
    if (step < steps && step % parts == parts - 1) bring<32>(values, v, key_of(step), columns);
    copy_commit();
  };
  for (int i = 0; i < parts; ++i) bring<kThreads>(shared + i * kTile, q, first, i * kDepth);
  copy_commit();
  bring_keys(0);
  bring_values(0);
  copy_wait<2>();
  __syncthreads();

  // A row's largest score so far, and the sum of the powers, are of two.
  float out[4][8] = {}, scores[4][8] = {}, top[4], total[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) top[i] = kBlocked;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int part = step % parts;
    copy_wait<1>();
    __syncwarp();
    multiply_heads(scores, shared + part * kTile + group * kRowStride, keys + l * kRowStride);
    __syncwarp();
    bring_keys(step + 1);
    if (part == parts - 1) {
      const int valid = p.texts - key_of(step) - l;  // of the lane's keys, which are 4 apart
      float less[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float highest = kBlocked;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (4 * j >= valid) scores[i][j] = kBlocked;
          highest = fmaxf(highest, scores[i][j]);
        }
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 2));
        highest = fmaxf(top[i], highest * kLog2e);
        less[i] = power_of_two(top[i] - highest);
        top[i] = highest;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          sum += scores[i][j] = power_of_two(fmaf(scores[i][j], kLog2e, -highest));
        }
        total[i] = fmaf(total[i], less[i], sum);
      }
      put_weights(weights + group * kRowStride + 8 * l, scores);
      copy_wait<1>();
      __syncwarp();
      average(scores, weights + group * kRowStride, values + 8 * l);
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        out[i / 8][i % 8] = fmaf(out[i / 8][i % 8], less[i / 8], scores[i / 8][i % 8]);
        scores[i / 8][i % 8] = 0;
      }
      __syncwarp();
    }
    bring_values(step + 1);
  }

  put_weights(weights + group * kRowStride + 8 * l, out);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float sum = row_sum(total[i]);
    if (l > 0) continue;
    numbers[warp * kRows + group + 8 * i] = top[i];
    numbers[(4 + warp) * kRows + group + 8 * i] = sum;
  }
  __syncthreads();

  // From here on a thread has 8 columns of one row.
  const int row = threadIdx.x / 4, query = first + row;
  float highest = kBlocked, sum = 0, all[8] = {};
#pragma unroll
  for (int w = 0; w < 4; ++w) highest = fmaxf(highest, numbers[w * kRows + row]);
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float less = power_of_two(numbers[w * kRows + row] - highest);
    sum = fmaf(less, numbers[(4 + w) * kRows + row], sum);
    float some[8];
    const float* const from =
        shared + (parts + w * kWarpTiles + 2) * kTile + row * kRowStride + 8 * l;
    load4(some, from), load4(some + 4, from + 4);
#pragma unroll
    for (int n = 0; n < 8; ++n) all[n] = fmaf(less, some[n], all[n]);
  }
  const float lse = fmaf(highest, kLn2, logf(sum));

  // An item also sees itself: its weight against the texts'.
  const bool itself = a.end > p.texts && p.op.bias[1][1] > kBlocked;
  float own = 0;
  if (itself && query >= p.texts && query < a.end) {
    const float* const y = p.s.y + int64_t(query) * 3 * p.width + head * p.depth;
    for (int j = l; j < p.depth; j += 4) own = fmaf(y[j], y[p.width + j], own);
  }
  const float2 odds = sigmoids(row_sum(own) + p.op.bias[1][1] - p.op.bias[1][0] - lse);
  if (query >= a.end) return;
  if (l == 0 && columns == 0) p.s.lse[int64_t(head) * p.rows + query] = lse;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const int in_head = columns + 8 * l + n, column = head * p.depth + in_head;
    if (in_head >= p.depth) continue;
    const float value = all[n] / sum;
    p.s.attended[int64_t(query) * p.width + column] = value;
    if (!itself || query < p.texts) continue;
    const float of_item = p.s.y[(int64_t(query) * 3 + 2) * p.width + column];
    p.s.merged[int64_t(query - p.texts) * p.width + column] = fmaf(odds.x, of_item, odds.y * value);
  }
}

}  // namespace fastadapters::cuda::head

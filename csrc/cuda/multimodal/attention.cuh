// Attention of all queries, texts and items, over the texts, head by head, never with the scores in
// memory.
//
// A block has 32 rows (queries; in backward also keys) and walks over the other side, 64 at a time,
// whose matrices stream through shared memory: transposed, by 32 of the head's d, to multiply along
// d; as they are, kColumns wide, to be summed. d beyond kColumns goes to other blocks. A warp has 8
// rows, a lane 4 of them and 4 of the 64 columns.
#pragma once

#include "../ptx.cuh"
#include "problem.cuh"
#include "product.cuh"

namespace fastadapters::cuda::head {

constexpr int kRows = 32, kKeys = 64;

struct AttentionForward {
  Problem p;
  int first, end;  // queries
};

struct AttentionBackward {
  Problem p;
  int first, end;
  const float *d_out, *delta;  // [C + B, E], [H, C + B]
  float* d_y;   // [C + B, 3 E]: keys and values of texts are written, queries added to, times
  float scale;  // of the queries
};

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

// to[k, row] = rows first.., columns begin.. of `side`: [32, kCount + 4], zeros outside.
template <int kCount>
__device__ __forceinline__ void bring_transposed(float* to, const Side& side, int first,
                                                 int begin) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    const int k = lane % 8 + 8 * (i % 4), row = lane / 8 + 4 * warp + 16 * (i / 4);
    const bool there = first + row < side.count && begin + k < side.depth;
    const float* const from = side.data + int64_t(first + row) * side.stride + begin + k;
    copy_number(to + k * (kCount + 4) + row, there ? from : side.data, there);
  }
}

// to[row, k]: [kKeys, kColumns]
template <int kColumns>
__device__ __forceinline__ void bring(float* to, const Side& side, int first, int begin) {
#pragma unroll
  for (int i = 0; i < kKeys * kColumns / kThreads; ++i) {
    const int at = threadIdx.x + i * kThreads, row = at / kColumns, k = at % kColumns;
    const bool there = first + row < side.count && begin + k < side.depth;
    const float* const from = side.data + int64_t(first + row) * side.stride + begin + k;
    copy_number(to + at, there ? from : side.data, there);
  }
}

// acc[4 rows, 4 columns] += left right along 32 of d.
__device__ __forceinline__ void multiply_heads(float (&acc)[4][4], const float* left,
                                               const float* right) {
#pragma unroll 8
  for (int k = 0; k < kDepth; ++k) {
    const float4 a = *reinterpret_cast<const float4*>(left + k * (kRows + 4));
    const float4 b = *reinterpret_cast<const float4*>(right + k * (kKeys + 4));
    outer(acc, a, b);
  }
}

// total[4 rows, kN columns] += weights[row, key] values[key, column]: over 64 keys, which have sums
// of their own: short chains of additions make small errors.
template <int kN>
__device__ __forceinline__ void average(float (&total)[4][kN], const float* weights,
                                        const float* values) {
  float sum[4][kN] = {};
#pragma unroll 4
  for (int key = 0; key < kKeys; key += 4) {
    float w[4][4], v[4][kN];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 four = *reinterpret_cast<const float4*>(weights + i * (kKeys + 4) + key);
      w[i][0] = four.x, w[i][1] = four.y, w[i][2] = four.z, w[i][3] = four.w;
      const float* const at = values + (key + i) * 16 * kN;
      if constexpr (kN == 2) {
        const float2 two = *reinterpret_cast<const float2*>(at);
        v[i][0] = two.x, v[i][1] = two.y;
      } else {
        const float4 all = *reinterpret_cast<const float4*>(at);
        v[i][0] = all.x, v[i][1] = all.y, v[i][2] = all.z, v[i][3] = all.w;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int row = 0; row < 4; ++row) {
#pragma unroll
        for (int n = 0; n < kN; ++n) sum[row][n] = fmaf(w[row][i], v[i][n], sum[row][n]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4 * kN; ++i) total[i / kN][i % kN] += sum[i / kN][i % kN];
}

__device__ __forceinline__ void put_weights(float* weights, const float (&from)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<float4*>(weights + i * (kKeys + 4)) = {from[i][0], from[i][1], from[i][2],
                                                             from[i][3]};
  }
}

// Over the 16 lanes that share rows.
__device__ __forceinline__ float row_sum(float value) {
#pragma unroll
  for (int step = 1; step < 16; step *= 2) value += __shfl_xor_sync(0xffffffff, value, step);
  return value;
}

// Floats of shared memory: resident rows, two steps of streams, weights.
template <int kColumns, int kTransposed, int kPlain>
inline int shared_floats(int depth) {
  const int resident = int(round_up(depth, kDepth)) * (kRows + 4);
  const int step = kTransposed * kDepth * (kKeys + 4) + kPlain * kKeys * kColumns;
  return kTransposed * resident + 2 * step + kPlain * kRows * (kKeys + 4);
}

template <int kColumns>
__global__ void __launch_bounds__(kThreads) attend(const __grid_constant__ AttentionForward a) {
  constexpr int kN = kColumns / 16;
  extern __shared__ __align__(16) float shared[];
  const Problem& p = a.p;
  const int head = blockIdx.y, columns = blockIdx.z * kColumns;
  const int first = a.first + blockIdx.x * kRows;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 8 + lane / 16 * 4, at = lane % 16;
  const auto side = [&](int part, int count) {
    return Side{p.s.y + part * p.width + head * p.depth, 3 * p.width, count, p.depth};
  };
  const Side q = side(0, a.end), k = side(1, p.texts), v = side(2, p.texts);
  const int parts = (p.depth + kDepth - 1) / kDepth;
  const int steps = (p.texts + kKeys - 1) / kKeys * parts;

  constexpr int kKeysSize = kDepth * (kKeys + 4), kSize = kKeysSize + kKeys * kColumns;
  float* const resident = shared;
  float* const stream = resident + parts * kDepth * (kRows + 4);
  float* const weights = stream + 2 * kSize + row * (kKeys + 4);
  const auto bring_step = [&](int step) {
    float* const to = stream + step % 2 * kSize;
    const int key = step / parts * kKeys, part = step % parts;
    bring_transposed<kKeys>(to, k, key, part * kDepth);
    if (part == parts - 1) bring<kColumns>(to + kKeysSize, v, key, columns);
  };
  for (int i = 0; i < parts; ++i) {
    bring_transposed<kRows>(resident + i * kDepth * (kRows + 4), q, first, i * kDepth);
  }
  bring_step(0);
  copy_commit();

  float out[4][kN] = {}, scores[4][4] = {}, top[4], total[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) top[i] = kBlocked;
  for (int step = 0; step < steps; ++step) {
    copy_wait<0>();
    __syncthreads();
    if (step + 1 < steps) bring_step(step + 1);
    copy_commit();
    const float* const now = stream + step % 2 * kSize;
    const int part = step % parts;
    multiply_heads(scores, resident + part * kDepth * (kRows + 4) + row, now + 4 * at);
    if (part != parts - 1) continue;
    const int valid = p.texts - step / parts * kKeys - 4 * at;  // of the lane's keys
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float highest = top[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j >= valid) scores[i][j] = kBlocked;
        highest = fmaxf(highest, scores[i][j]);
      }
#pragma unroll
      for (int s = 1; s < 16; s *= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, s));
      }
      const float less = expf(top[i] - highest);
      top[i] = highest;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) sum += scores[i][j] = expf(scores[i][j] - highest);
      total[i] = fmaf(total[i], less, sum);
#pragma unroll
      for (int n = 0; n < kN; ++n) out[i][n] *= less;
    }
    __syncwarp();
    put_weights(weights + 4 * at, scores);
    __syncwarp();
    average<kN>(out, weights, now + kKeysSize + at * kN);
#pragma unroll
    for (int i = 0; i < 16; ++i) scores[i / 4][i % 4] = 0;
  }

  // An item also sees itself: its weight against the texts'.
  const bool itself = a.end > p.texts && p.op.bias[1][1] > kBlocked;
  float lse[4];
  float2 odds[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    total[i] = row_sum(total[i]);
    lse[i] = logf(total[i]) + top[i];
    float own = 0;
    const int query = first + row + i;
    if (itself && query >= p.texts && query < a.end) {
      const float* const y = p.s.y + int64_t(query) * 3 * p.width + head * p.depth;
      for (int j = at; j < p.depth; j += 16) own = fmaf(y[j], y[p.width + j], own);
    }
    odds[i] = sigmoids(row_sum(own) + p.op.bias[1][1] - p.op.bias[1][0] - lse[i]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int query = first + row + i;
    if (query >= a.end) continue;
    if (at == 0 && columns == 0) p.s.lse[int64_t(head) * p.rows + query] = lse[i];
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int column = head * p.depth + columns + at * kN + n;
      if (columns + at * kN + n >= p.depth) continue;
      const float value = out[i][n] / total[i];
      p.s.attended[int64_t(query) * p.width + column] = value;
      if (!itself || query < p.texts) continue;
      const float own = p.s.y[(int64_t(query) * 3 + 2) * p.width + column];
      p.s.merged[int64_t(query - p.texts) * p.width + column] =
          fmaf(odds[i].x, own, odds[i].y * value);
    }
  }
}

// kKeysOwn: a block has keys and values, and walks over the queries; else it has queries.
//     P = exp(q k - lse), dS = P (dO v - delta); dq = dS k; dk = dS^T q, dv = P^T dO
template <int kColumns, bool kKeysOwn>
__device__ void attend_backward_rows(const AttentionBackward& a, int tile) {
  constexpr int kN = kColumns / 16, kPlain = kKeysOwn ? 2 : 1;
  extern __shared__ __align__(16) float shared[];
  const Problem& p = a.p;
  const int head = blockIdx.y, columns = blockIdx.z * kColumns;
  const int first = (kKeysOwn ? 0 : a.first) + tile * kRows;
  const int start = kKeysOwn ? a.first : 0;  // of the other side
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 8 + lane / 16 * 4, at = lane % 16;
  const auto side = [&](int part, int count) {
    return Side{p.s.y + part * p.width + head * p.depth, 3 * p.width, count, p.depth};
  };
  const Side q = side(0, a.end), k = side(1, p.texts), v = side(2, p.texts);
  const Side d_out{a.d_out + head * p.depth, p.width, a.end, p.depth};
  const Side own[2] = {kKeysOwn ? k : q, kKeysOwn ? v : d_out};
  const Side other[2] = {kKeysOwn ? q : k, kKeysOwn ? d_out : v};
  const int count = other[0].count, own_count = own[0].count;
  const int parts = (p.depth + kDepth - 1) / kDepth;
  const int steps = (count - start + kKeys - 1) / kKeys * parts;

  constexpr int kPanel = kDepth * (kKeys + 4), kSums = kKeys * kColumns;
  constexpr int kSize = 2 * kPanel + kPlain * kSums, kWeights = kRows * (kKeys + 4);
  const int resident_size = parts * kDepth * (kRows + 4);
  float* const stream = shared + 2 * resident_size;
  float* const weights = stream + 2 * kSize + row * (kKeys + 4);
  const auto bring_step = [&](int step) {
    float* const to = stream + step % 2 * kSize;
    const int from = start + step / parts * kKeys, part = step % parts;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bring_transposed<kKeys>(to + i * kPanel, other[i], from, part * kDepth);
      if (part == parts - 1 && i < kPlain) {
        bring<kColumns>(to + 2 * kPanel + i * kSums, other[i], from, columns);
      }
    }
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    for (int part = 0; part < parts; ++part) {
      float* const to = shared + i * resident_size + part * kDepth * (kRows + 4);
      bring_transposed<kRows>(to, own[i], first, part * kDepth);
    }
  }
  bring_step(0);
  copy_commit();

  const float* const lse = p.s.lse + int64_t(head) * p.rows;
  const float* const delta = a.delta + int64_t(head) * p.rows;
  float of_row[2][4] = {};
  if constexpr (!kKeysOwn) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = min(first + row + i, a.end - 1);
      of_row[0][i] = lse[query], of_row[1][i] = delta[query];
    }
  }
  float sums[kPlain][4][kN] = {}, scores[4][4] = {}, d_weights[4][4] = {};
  for (int step = 0; step < steps; ++step) {
    copy_wait<0>();
    __syncthreads();
    if (step + 1 < steps) bring_step(step + 1);
    copy_commit();
    const float* const now = stream + step % 2 * kSize;
    const int part = step % parts;
    const float* const mine = shared + part * kDepth * (kRows + 4) + row;
    multiply_heads(scores, mine, now + 4 * at);
    multiply_heads(d_weights, mine + resident_size, now + kPanel + 4 * at);
    if (part != parts - 1) continue;
    const int from = start + step / parts * kKeys + 4 * at;
    float of_column[2][4] = {};
    if constexpr (kKeysOwn) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int query = min(from + j, a.end - 1);
        of_column[0][j] = lse[query], of_column[1][j] = delta[query];
      }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int r = i / 4, c = i % 4;
      const float less = kKeysOwn ? of_column[0][c] : of_row[0][r];
      const float about = kKeysOwn ? of_column[1][c] : of_row[1][r];
      const float weight = from + c < count ? expf(scores[r][c] - less) : 0;
      scores[r][c] = weight;
      d_weights[r][c] = weight * (d_weights[r][c] - about);
    }
    __syncwarp();
    put_weights(weights + 4 * at, d_weights);
    if constexpr (kKeysOwn) put_weights(weights + kWeights + 4 * at, scores);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPlain; ++i) {
      average<kN>(sums[i], weights + i * kWeights, now + 2 * kPanel + i * kSums + at * kN);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) scores[i / 4][i % 4] = d_weights[i / 4][i % 4] = 0;
  }
#pragma unroll
  for (int i = 0; i < 4 * kN; ++i) {
    const int r = first + row + i / kN, column = columns + at * kN + i % kN;
    if (r >= own_count || column >= p.depth) continue;
    float* const to = a.d_y + int64_t(r) * 3 * p.width + head * p.depth + column;
    if constexpr (kKeysOwn) {
      to[p.width] = sums[0][i / kN][i % kN];
      to[2 * p.width] = sums[kPlain - 1][i / kN][i % kN];
    } else {
      *to = fmaf(a.scale, sums[0][i / kN][i % kN], *to);
    }
  }
}

template <int kColumns>
__global__ void __launch_bounds__(kThreads)
    attend_backward(const __grid_constant__ AttentionBackward a) {
  const int key_tiles = (a.p.texts + kRows - 1) / kRows;
  if (int(blockIdx.x) < key_tiles) {
    attend_backward_rows<kColumns, true>(a, blockIdx.x);
  } else {
    attend_backward_rows<kColumns, false>(a, blockIdx.x - key_tiles);
  }
}

}  // namespace fastadapters::cuda::head

// Backward of the attention over the texts: with queries for rows, and with keys.
#pragma once

#include "attention.cuh"

namespace fastadapters::cuda::head {

struct AttentionBackward {
  Problem p;
  int first, end;
  const float *d_out, *delta;  // [C + B, E], [H, C + B]
  float* d_y;   // [C + B, 3 E]: keys and values of texts are written, queries added to, times
  float scale;  // of the queries
};

// kKeysOwn: a block has keys and values, and walks over the queries; else it has queries.
//     P = exp(q k - lse), dS = P (dO v - delta); dq = dS k; dk = dS^T q, dv = P^T dO
template <bool kKeysOwn>
__device__ void attend_backward_rows(const AttentionBackward& a, int tile) {
  constexpr int kSums = kKeysOwn ? 2 : 1;
  extern __shared__ __align__(16) float shared[];
  const Problem& p = a.p;
  const int head = blockIdx.y, parts = gridDim.z;
  const int first = (kKeysOwn ? 0 : a.first) + tile * kRows;
  const int start = kKeysOwn ? a.first : 0;  // of the other side
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, l = threadIdx.x % 4;
  const auto side = [&](int part, int count) {
    return Side{p.s.y + part * p.width + head * p.depth, 3 * p.width, count, p.depth};
  };
  const Side q = side(0, a.end), k = side(1, p.texts), v = side(2, p.texts);
  const Side d_out{a.d_out + head * p.depth, p.width, a.end, p.depth};
  const Side own[2] = {kKeysOwn ? k : q, kKeysOwn ? v : d_out};
  const Side other[2] = {kKeysOwn ? q : k, kKeysOwn ? d_out : v};
  const int count = other[0].count, own_count = own[0].count;

  float* const tiles = shared + (2 * parts + warp * kWarpTiles) * kTile;
  float* const weights = tiles + 2 * kTile;
  const int steps = ((count - start + kRows - 1) / kRows - warp + 3) / 4 * parts;
  const auto from_of = [&](int step) { return start + (step / parts * 4 + warp) * kRows; };
  // The last part is that of the block's columns: its tiles are what is summed, too.
  const auto part_of = [&](int step) { return (blockIdx.z + 1 + step) % parts; };
  const auto bring_step = [&](int i, int step) {
    if (step < steps) {
      bring<32>(tiles + i * kTile, other[i], from_of(step), part_of(step) * kDepth);
    }
    copy_commit();
  };
  for (int part = 0; part < parts; ++part) {
    bring<kThreads>(shared + part * kTile, own[0], first, part * kDepth);
    bring<kThreads>(shared + (parts + part) * kTile, own[1], first, part * kDepth);
  }
  copy_commit();
  bring_step(1, 0);
  bring_step(0, 0);

  const float* const lse = p.s.lse + int64_t(head) * p.rows;
  const float* const delta = a.delta + int64_t(head) * p.rows;
  float of_row[2][4] = {};
  if constexpr (!kKeysOwn) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = min(first + group + 8 * i, a.end - 1);
      of_row[0][i] = lse[query] * kLog2e, of_row[1][i] = delta[query];
    }
  }
  copy_wait<2>();
  __syncthreads();
  float sums[kSums][4][8] = {}, scores[4][8] = {}, d_weights[4][8] = {};
  const auto add = [&](int i, const float* values) {
    float sum[4][8];
    average(sum, weights + group * kRowStride, values + 8 * l);
#pragma unroll
    for (int n = 0; n < 32; ++n) sums[i][n / 8][n % 8] += sum[n / 8][n % 8];
  };
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const bool last = step % parts == parts - 1;
    const float* const mine = shared + part_of(step) * kTile + group * kRowStride;
    copy_wait<1>();
    __syncwarp();
    multiply_heads(d_weights, mine + parts * kTile, tiles + kTile + l * kRowStride);
    copy_wait<0>();
    __syncwarp();
    multiply_heads(scores, mine, tiles + l * kRowStride);
    if (last) {
      const int from = from_of(step) + l;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int query = min(from + 4 * j, a.end - 1);
        const float of_lse = kKeysOwn ? lse[query] * kLog2e : 0;
        const float of_delta = kKeysOwn ? delta[query] : 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float less = kKeysOwn ? of_lse : of_row[0][i];
          const float weight = power_of_two(fmaf(scores[i][j], kLog2e, -less));
          scores[i][j] = from + 4 * j < count ? weight : 0;
          d_weights[i][j] = scores[i][j] * (d_weights[i][j] - (kKeysOwn ? of_delta : of_row[1][i]));
        }
      }
      if constexpr (kKeysOwn) {
        put_weights(weights + group * kRowStride + 8 * l, scores);
        __syncwarp();
        add(kSums - 1, tiles + kTile);
        __syncwarp();
      }
    }
    bring_step(1, step + 1);
    if (last) {
      put_weights(weights + group * kRowStride + 8 * l, d_weights);
      __syncwarp();
      add(0, tiles);
#pragma unroll
      for (int i = 0; i < 32; ++i) scores[i / 8][i % 8] = d_weights[i / 8][i % 8] = 0;
    }
    __syncwarp();
    bring_step(0, step + 1);
  }
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    put_weights(weights - i * kTile + group * kRowStride + 8 * l, sums[i]);
  }
  __syncthreads();

  // From here on a thread has 8 columns of one row.
  const int row = first + threadIdx.x / 4, column = blockIdx.z * kDepth + 8 * l;
  if (row >= own_count) return;
  float* const to = a.d_y + int64_t(row) * 3 * p.width + head * p.depth + column;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    float all[8] = {};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float some[8];
      const float* const from = shared + (2 * parts + w * kWarpTiles + 2 - i) * kTile +
                                threadIdx.x / 4 * kRowStride + 8 * l;
      load4(some, from), load4(some + 4, from + 4);
#pragma unroll
      for (int n = 0; n < 8; ++n) all[n] += some[n];
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      if (column + n >= p.depth) continue;
      if constexpr (kKeysOwn) {
        to[(1 + i) * p.width + n] = all[n];
      } else {
        to[n] = fmaf(a.scale, all[n], to[n]);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    attend_backward(const __grid_constant__ AttentionBackward a) {
  const int key_tiles = (a.p.texts + kRows - 1) / kRows;
  if (int(blockIdx.x) < key_tiles) {
    attend_backward_rows<true>(a, blockIdx.x);
  } else {
    attend_backward_rows<false>(a, blockIdx.x - key_tiles);
  }
}

}  // namespace fastadapters::cuda::head

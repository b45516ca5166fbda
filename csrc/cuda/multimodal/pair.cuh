// The pair stage, where e depends on text and item: from [C, .] and [B, .] to logits, and back.
//
// A warp has two texts and 32 items, one a lane; its block's texts follow each other. A lane's
// vectors of R lie in shared memory, a row for each r (or in memory, if R is large), where others
// find them when backward sums over items or over texts.
#pragma once

#include "mixture.cuh"

namespace fastadapters::cuda::head {

struct PairForward {
  Problem p;
  float* scratch;  // of blocks, if shared memory is too small
  int64_t scratch_size;
};

__device__ __forceinline__ void load8(float (&to)[8], const float* from) {
  const float4 a = __ldg(reinterpret_cast<const float4*>(from));
  const float4 b = __ldg(reinterpret_cast<const float4*>(from) + 1);
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
  to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

// The two weights of each head for a lane's pairs, to shared memory: [2 H, pairs]
__device__ __forceinline__ void put_weights(const Problem& p, const Place& at, float* weights,
                                            const int (&text)[2]) {
  for (int h = 0; h < p.heads; ++h) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t from = (int64_t(h) * p.texts + text[i]) * p.items + at.item_read;
      const float2 weight = sigmoids(p.s.odds[from]);
      weights[h * at.stride + at.pair(i)] = weight.x;
      weights[(p.heads + h) * at.stride + at.pair(i)] = weight.y;
    }
  }
}

// z of 8 r from r0 on, of a lane's pairs.
__device__ __forceinline__ void mix_heads(const Problem& p, const Place& at, const float* weights,
                                          const int (&text)[2], int r0, float (&z)[2][8]) {
  for (int h = 0; h < p.heads; ++h) {
    float from_item[8];
    const float* const item = p.s.from_item + (int64_t(h) * p.padded + r0) * p.items + at.item_read;
#pragma unroll
    for (int u = 0; u < 8; ++u) from_item[u] = item[int64_t(u) * p.items];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float from_text[8];
      load8(from_text, p.s.from_text + (int64_t(text[i]) * p.heads + h) * p.padded + r0);
      const float w = weights[h * at.stride + at.pair(i)];
      const float v = weights[(p.heads + h) * at.stride + at.pair(i)];
#pragma unroll
      for (int u = 0; u < 8; ++u) {
        z[i][u] = fmaf(v, from_text[u], fmaf(w, from_item[u], z[i][u]));
      }
    }
  }
}

template <bool kShared>
__global__ void __launch_bounds__(128, 4) pair_forward(const __grid_constant__ PairForward a) {
  extern __shared__ __align__(16) float shared[];
  const Problem& p = a.p;
  const Place at(p);
  float* const e = kShared ? shared : a.scratch + blockIdx.x * a.scratch_size;
  float* const weights = e + p.padded * at.stride;
  const int text[2] = {min(at.text(at.text_tile, 0), p.texts - 1),
                       min(at.text(at.text_tile, 1), p.texts - 1)};
  put_weights(p, at, weights, text);

  Pair pair[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float corner = p.s.factor[int64_t(p.rank + 1) * p.padded];
    pair[i].square = corner * corner;
    pair[i].text_dot = p.s.text_c[text[i]];
    pair[i].item_dot = p.s.item_c[at.item_read];
    pair[i].similarity = p.s.similarity[int64_t(text[i]) * p.items + at.item_read];
    pair[i].text_square = p.s.text_square[text[i]];
  }
  for (int r0 = 0; r0 < p.padded; r0 += 8) {
    float z[2][8] = {}, text_w[8];
    mix_heads(p, at, weights, text, r0, z);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load8(text_w, p.s.text_w + int64_t(text[i]) * p.padded + r0);
#pragma unroll
      for (int u = 0; u < 8; ++u) {
        const float value = activate_inner(p, z[i][u]);
        e[(r0 + u) * at.stride + at.pair(i)] = value;
        pair[i].text_dot = fmaf(text_w[u], value, pair[i].text_dot);
        const float item_w = p.s.item_w[int64_t(r0 + u) * p.items + at.item_read];
        pair[i].item_dot = fmaf(item_w, value, pair[i].item_dot);
      }
    }
  }
  // |u|^2 = |U (e, 1)|^2
  for (int i0 = 0; i0 < p.padded; i0 += 8) {
    float f[2][8];
    load8(f[0], p.s.factor + int64_t(p.rank) * p.padded + i0);
#pragma unroll
    for (int u = 0; u < 8; ++u) f[1][u] = f[0][u];
#pragma unroll 4
    for (int j = i0; j < p.rank; ++j) {
      float column[8];
      load8(column, p.s.factor + int64_t(j) * p.padded + i0);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float value = e[j * at.stride + at.pair(i)];
#pragma unroll
        for (int u = 0; u < 8; ++u) f[i][u] = fmaf(column[u], value, f[i][u]);
      }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i)
      pair[i / 8].square = fmaf(f[i / 8][i % 8], f[i / 8][i % 8], pair[i / 8].square);
  }

  const Mixture mix(p);
  float logits[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Cosine c(mix, pair[i]);
    logits[i] = mix.scale * c.cosine * c.rho;
    const int64_t to = int64_t(at.text(at.text_tile, i)) * p.items + at.item;
    if (at.item < p.items && at.text(at.text_tile, i) < p.texts) {
      p.s.square[to] = pair[i].square;
      p.s.text_dot[to] = pair[i].text_dot;
      p.s.item_dot[to] = pair[i].item_dot;
    }
  }
  store_logits(p, at, at.text_tile, logits);
}

}  // namespace fastadapters::cuda::head

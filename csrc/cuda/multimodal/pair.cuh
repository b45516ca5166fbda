// The pair stage, where e depends on text and item: from [C, .] and [B, .] to logits, and back.
//
// A warp has two texts and 32 items, one a lane; its block's texts follow each other. A lane's
// vectors of R lie in shared memory, a row for each r (or in memory, if R is large), where others
// find them when backward sums over items or over texts.
#pragma once

#include "problem.cuh"

namespace fastadapters::cuda::head {

struct PairForward {
  Problem p;
  float* scratch;  // of blocks, if shared memory is too small
  int64_t scratch_size;
};

// Partial sums lie slab by slab: of texts over the items of a block, of items over the texts of
// one, of the rest over both.
struct PairBackward {
  Problem p;
  float* scratch;
  int64_t scratch_size;
  int tiles_per_block;                       // of texts
  float* d_similarity;                       // [C, B], by the unit item; times text_scale
  float* d_odds;                             // [H, C, B]
  float *d_from_text, *d_text_w, *d_text_c;  // [slab][C, H, padded], [C, padded], [C]; * text_scale
  float *d_from_item, *d_item_w, *d_item_c;  // [slab][B, H, padded], [B, padded], [B]
  float* d_square_form;                      // [slab][R + 1, padded] + 1: 2 sum dq (e, 1) (e, 1)^T
  float *d_scale, *d_blend;                  // [slab]
};

// The scalar part of a pair.
struct Mixture {
  float blend, rest, scale;

  __device__ explicit Mixture(const Problem& p)
      : blend(number(p.op.parameters.blend, p.op.blend_value)),
        rest(1 - blend),
        scale(number(p.op.parameters.logit_scale, p.op.scale_value)) {}
};

struct Pair {
  float square, text_dot, item_dot, similarity, text_square;
};

struct Cosine {
  float n, one, m, cosine, rho;  // 1 / |u|; |u|^2 n^2; |new text|^2; 1 / |new text|

  __device__ Cosine(const Mixture& mix, const Pair& a) {
    n = rsqrtf(fmaxf(a.square, 1e-24f));
    one = a.square >= 1e-24f ? 1 : a.square * n * n;
    m = mix.blend * mix.blend * one + mix.rest * mix.rest * a.text_square +
        2 * mix.blend * mix.rest * a.text_dot * n;
    cosine = mix.blend * a.item_dot * n + mix.rest * a.similarity;
    rho = rsqrtf(fmaxf(m, 1e-24f));
  }
};

struct PairGradients {
  float square, text_dot, item_dot, similarity, m, scale, blend;

  __device__ PairGradients(const Mixture& mix, const Pair& a, float d_logit) {
    const Cosine c(mix, a);
    const float l = mix.blend, r = mix.rest, d = mix.scale * c.rho * d_logit;
    m = c.m >= 1e-24f ? -0.5f * d * c.cosine * c.rho * c.rho : 0;
    item_dot = l * c.n * d;
    text_dot = 2 * l * r * c.n * m;
    similarity = r * d;
    // Above the floor what goes through |u|^2 n^2 cancels: it is not computed.
    square = a.square >= 1e-24f
                 ? -0.5f * c.n * c.n * (a.item_dot * item_dot + a.text_dot * text_dot)
                 : l * l * c.n * c.n * m;
    scale = d_logit * c.cosine * c.rho;
    blend = (a.item_dot * c.n - a.similarity) * d +
            (2 * l * c.one - 2 * r * a.text_square + 2 * (1 - 2 * l) * a.text_dot * c.n) * m;
  }
};

// Where a block and its lanes are.
struct Place {
  int warps, pairs, stride, lane, warp, item, item_read;
  __device__ explicit Place(const Problem& p)
      : warps(blockDim.x / 32),
        pairs(64 * warps),
        stride(pairs + 1),  // odd: a column too meets each bank once
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        item(blockIdx.x * 32 + lane),
        item_read(min(item, p.items - 1)) {}
  __device__ int text(int tile, int which) const { return (tile * warps + warp) * 2 + which; }
  __device__ int pair(int which) const { return (2 * warp + which) * 32 + lane; }
};

// The block's logits lie by items in memory: [32][texts of a block], through shared memory.
__device__ __forceinline__ void store_logits(const Problem& p, const Place& at, int tile,
                                             const float (&logits)[2]) {
  __shared__ float staged[32][9];
#pragma unroll
  for (int i = 0; i < 2; ++i) staged[at.lane][2 * at.warp + i] = logits[i];
  __syncthreads();
  const int across = 2 * at.warps, text = tile * across + threadIdx.x % across;
  for (int i = threadIdx.x / across; i < 32; i += 16) {
    const int item = blockIdx.x * 32 + i;
    if (item >= p.items || text >= p.texts) continue;
    store({p.logits, p.op.out_dtype}, int64_t(item) * p.texts + text,
          staged[i][threadIdx.x % across]);
  }
}

// ... and their gradients, 0 where there is no such pair.
__device__ __forceinline__ void load_logits(const Problem& p, const Place& at, int tile,
                                            float (&logits)[2]) {
  __shared__ float staged[32][9];
  const int across = 2 * at.warps, text = tile * across + threadIdx.x % across;
  __syncthreads();
  for (int i = threadIdx.x / across; i < 32; i += 16) {
    const int item = blockIdx.x * 32 + i;
    const bool there = item < p.items && text < p.texts;
    staged[i][threadIdx.x % across] =
        there ? load(p.d_logits, p.op.out_dtype, int64_t(item) * p.texts + text) : 0;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) logits[i] = staged[at.lane][2 * at.warp + i];
}

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
__global__ void __launch_bounds__(128) pair_forward(const __grid_constant__ PairForward a) {
  extern __shared__ __align__(16) float shared[];
  const Problem& p = a.p;
  const Place at(p);
  float* const e =
      kShared ? shared : a.scratch + (blockIdx.y * gridDim.x + blockIdx.x) * a.scratch_size;
  float* const weights = e + p.padded * at.stride;
  const int text[2] = {min(at.text(blockIdx.y, 0), p.texts - 1),
                       min(at.text(blockIdx.y, 1), p.texts - 1)};
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
    const int64_t to = int64_t(at.text(blockIdx.y, i)) * p.items + at.item;
    if (at.item < p.items && at.text(blockIdx.y, i) < p.texts) {
      p.s.square[to] = pair[i].square;
      p.s.text_dot[to] = pair[i].text_dot;
      p.s.item_dot[to] = pair[i].item_dot;
    }
  }
  store_logits(p, at, blockIdx.y, logits);
}

// form[i, j] (+)= sum over a block's pairs of factor e_i e_j. A thread has 4 x 4 of them, `across`
// rows and columns apart, on or above the diagonal; threads without any share the pairs of others,
// by eights, so that each meets banks of its own. `room`: 16 numbers a thread.
__device__ inline void sum_squares(const Problem& p, const Place& at, const float* e,
                                   const float* factor, float* room, float* form, bool first) {
  const int threads = blockDim.x, across = p.padded / 4, tiles = across * (across + 1) / 2;
  for (int begin = 0; begin < tiles; begin += threads) {
    const int count = min(tiles - begin, threads), groups = min(threads / count, 4);
    const int group = threadIdx.x / count;
    const auto place = [&](int tile, int* i, int* j) {
      int row = 0;
      for (tile += begin; tile >= across - row; ++row) tile -= across - row;
      *i = row, *j = row + tile;
    };
    if (group < groups) {
      int i, j;
      place(threadIdx.x % count, &i, &j);
      float acc[4][4] = {};
      for (int from = 8 * group; from < at.pairs; from += 8 * groups) {
        float sums[4][4] = {};
#pragma unroll
        for (int k = from; k < from + 8; ++k) {
          float left[4], right[4];
#pragma unroll
          for (int u = 0; u < 4; ++u) {
            left[u] = factor[k] * e[(i + u * across) * at.stride + k];
            right[u] = e[(j + u * across) * at.stride + k];
          }
          outer(sums, {left[0], left[1], left[2], left[3]},
                {right[0], right[1], right[2], right[3]});
        }
#pragma unroll
        for (int u = 0; u < 16; ++u) acc[u / 4][u % 4] += sums[u / 4][u % 4];
      }
#pragma unroll
      for (int u = 0; u < 16; ++u) room[u * threads + threadIdx.x] = acc[u / 4][u % 4];
    }
    __syncthreads();
    for (int k = threadIdx.x; k < 16 * count; k += threads) {
      int i, j;
      place(k % count, &i, &j);
      float sum = 0;
      for (int g = 0; g < groups; ++g) sum += room[k / count * threads + g * count + k % count];
      const bool mirrored = i != j;
      i += k / count / 4 * across, j += k / count % 4 * across;
      if (i >= p.rank || j >= p.rank) continue;
      const auto add = [&](int row, int column) {
        float& to = form[int64_t(row) * p.padded + column];
        to = first ? sum : to + sum;
      };
      add(i, j);
      if (mirrored) add(j, i);
    }
    __syncthreads();
  }
}

// Backward, tile by tile of texts for the block's 32 items: everything is computed again but what a
// pair's scalar part needs.
template <bool kShared>
__global__ void __launch_bounds__(128) pair_backward(const __grid_constant__ PairBackward a) {
  extern __shared__ __align__(16) float shared[];
  const Problem& p = a.p;
  const Place at(p);
  const int block = blockIdx.y * gridDim.x + blockIdx.x, vector = p.padded * at.stride;
  float* const e = kShared ? shared : a.scratch + block * a.scratch_size;
  float* const dz = e + vector;  // first the slope of e at z
  float* const weights = dz + vector;
  float* const d_weights = weights + 2 * p.heads * at.stride;  // [H, pairs] by log-odds, at last
  float* const scalars = d_weights + p.heads * at.stride;      // [3, pairs] 2 dq, d(t u), d(i u)
  float* const sums = scalars + 3 * at.stride;                 // [warps, padded] 2 sum dq e
  for (int r = at.lane; r < p.padded; r += 32) sums[at.warp * p.padded + r] = 0;

  const Mixture mix(p);
  const int tiles = (p.texts + 2 * at.warps - 1) / (2 * at.warps);
  const int begin = blockIdx.y * a.tiles_per_block, end = min(begin + a.tiles_per_block, tiles);
  float d_scale = 0, d_blend = 0, d_square = 0;
  const int64_t item_slab = int64_t(blockIdx.y) * p.items,
                text_slab = int64_t(blockIdx.x) * p.texts;
  float* const form = a.d_square_form + block * (int64_t(p.rank + 1) * p.padded + 1);

  for (int tile = begin; tile < end; ++tile) {
    const bool first = tile == begin;
    const int text[2] = {min(at.text(tile, 0), p.texts - 1), min(at.text(tile, 1), p.texts - 1)};
    float d_logits[2];
    load_logits(p, at, tile, d_logits);  // with a barrier: the last tile's sums are done
    put_weights(p, at, weights, text);
    float d_square_of[2], d_text_dot[2], d_item_dot[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t from = int64_t(text[i]) * p.items + at.item_read;
      const PairGradients d(mix,
                            {p.s.square[from], p.s.text_dot[from], p.s.item_dot[from],
                             p.s.similarity[from], p.s.text_square[text[i]]},
                            d_logits[i]);
      d_scale += d.scale, d_blend += d.blend, d_square += d.square;
      d_square_of[i] = 2 * d.square, d_text_dot[i] = d.text_dot, d_item_dot[i] = d.item_dot;
      scalars[at.pair(i)] = d_square_of[i];
      scalars[at.stride + at.pair(i)] = d.text_dot;
      scalars[2 * at.stride + at.pair(i)] = d.item_dot;
      if (at.item < p.items && at.text(tile, i) < p.texts) {
        a.d_similarity[from] = d.similarity * p.s.text_scale[text[i]];
      }
    }
    for (int r0 = 0; r0 < p.padded; r0 += 8) {
      float z[2][8] = {};
      mix_heads(p, at, weights, text, r0, z);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float2 value = p.gelu ? gelu(z[i / 8][i % 8]) : float2{z[i / 8][i % 8], 1};
        e[(r0 + i % 8) * at.stride + at.pair(i / 8)] = value.x;
        dz[(r0 + i % 8) * at.stride + at.pair(i / 8)] = value.y;
      }
    }
    for (int i = 0; i < 2 * p.heads; ++i) {
      d_weights[i / 2 * at.stride + at.pair(i % 2)] = 0;
    }
    // de = 2 dq (G e + g) + d(t u) t W + d(i u) i W, and through the activation and the mixture.
    for (int r0 = 0; r0 < p.padded; r0 += 8) {
      float de[2][8];
      load8(de[0], p.s.square_form + int64_t(p.rank) * p.padded + r0);
#pragma unroll
      for (int u = 0; u < 8; ++u) de[1][u] = de[0][u];
#pragma unroll 4
      for (int j = 0; j < p.rank; ++j) {
        float row[8];
        load8(row, p.s.square_form + int64_t(j) * p.padded + r0);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float value = e[j * at.stride + at.pair(i)];
#pragma unroll
          for (int u = 0; u < 8; ++u) de[i][u] = fmaf(row[u], value, de[i][u]);
        }
      }
      float item_w[8];
#pragma unroll
      for (int u = 0; u < 8; ++u) {
        item_w[u] = p.s.item_w[int64_t(r0 + u) * p.items + at.item_read];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float text_w[8];
        load8(text_w, p.s.text_w + int64_t(text[i]) * p.padded + r0);
#pragma unroll
        for (int u = 0; u < 8; ++u) {
          float& slope = dz[(r0 + u) * at.stride + at.pair(i)];
          de[i][u] = slope * fmaf(d_square_of[i], de[i][u],
                                  fmaf(d_text_dot[i], text_w[u], d_item_dot[i] * item_w[u]));
          slope = de[i][u];
        }
      }
      for (int h = 0; h < p.heads; ++h) {
        float from_item[8];
        const float* const item =
            p.s.from_item + (int64_t(h) * p.padded + r0) * p.items + at.item_read;
#pragma unroll
        for (int u = 0; u < 8; ++u) from_item[u] = item[int64_t(u) * p.items];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float from_text[8], sum = 0;
          load8(from_text, p.s.from_text + (int64_t(text[i]) * p.heads + h) * p.padded + r0);
#pragma unroll
          for (int u = 0; u < 8; ++u) sum = fmaf(de[i][u], from_item[u] - from_text[u], sum);
          d_weights[h * at.stride + at.pair(i)] += sum;
        }
      }
    }
    for (int h = 0; h < p.heads; ++h) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (at.item >= p.items || at.text(tile, i) >= p.texts) continue;
        const int in = h * at.stride + at.pair(i);
        a.d_odds[(int64_t(h) * p.texts + text[i]) * p.items + at.item] =
            d_weights[in] * weights[in] * weights[in + p.heads * at.stride];
      }
    }
    __syncthreads();

    // Sums over the items, by the warp that has the text; a lane has an r.
    for (int i = 0; i < 2; ++i) {
      const int c = at.text(tile, i), pair = (2 * at.warp + i) * 32;
      const float scale = p.s.text_scale[text[i]];
      for (int r = at.lane; r < p.padded; r += 32) {
        const float* const e_row = e + r * at.stride + pair;
        const float* const dz_row = dz + r * at.stride + pair;
        float w_sum = 0, form_sum = 0;
        for (int b = 0; b < 32; ++b) {
          form_sum = fmaf(scalars[pair + b], e_row[b], form_sum);
          w_sum = fmaf(scalars[at.stride + pair + b], e_row[b], w_sum);
        }
        sums[at.warp * p.padded + r] += form_sum;
        if (c < p.texts) a.d_text_w[(text_slab + c) * p.padded + r] = w_sum * scale;
        for (int h0 = 0; h0 < p.heads; h0 += 4) {
          float head_sum[4] = {};
          for (int b = 0; b < 32; ++b) {
            const float value = dz_row[b];
#pragma unroll
            for (int h = 0; h < 4; ++h) {
              const float v = weights[(p.heads + min(h0 + h, p.heads - 1)) * at.stride + pair + b];
              head_sum[h] = fmaf(v, value, head_sum[h]);
            }
          }
#pragma unroll
          for (int h = 0; h < 4; ++h) {
            if (c >= p.texts || h0 + h >= p.heads) continue;
            a.d_from_text[((text_slab + c) * p.heads + h0 + h) * p.padded + r] = head_sum[h];
          }
        }
      }
      const float c_sum = warp_sum(d_text_dot[i]);
      if (at.lane == 0 && c < p.texts) a.d_text_c[text_slab + c] = c_sum * scale;
    }
    // Sums over the texts, item by item.
    for (int i = at.warp; i < 32; i += at.warps) {
      const int item = blockIdx.x * 32 + i;
      if (item >= p.items) continue;
      const auto add = [&](float* to, float value) { *to = first ? value : *to + value; };
      for (int r = at.lane; r < p.padded; r += 32) {
        const float* const e_row = e + r * at.stride + i;
        const float* const dz_row = dz + r * at.stride + i;
        float w_sum = 0;
        for (int c = 0; c < 64 * at.warps; c += 32) {
          w_sum = fmaf(scalars[2 * at.stride + c + i], e_row[c], w_sum);
        }
        add(a.d_item_w + (item_slab + item) * p.padded + r, w_sum);
        for (int h0 = 0; h0 < p.heads; h0 += 4) {
          float head_sum[4] = {};
          for (int c = 0; c < 64 * at.warps; c += 32) {
            const float value = dz_row[c];
#pragma unroll
            for (int h = 0; h < 4; ++h) {
              const float w = weights[min(h0 + h, p.heads - 1) * at.stride + c + i];
              head_sum[h] = fmaf(w, value, head_sum[h]);
            }
          }
#pragma unroll
          for (int h = 0; h < 4; ++h) {
            if (h0 + h >= p.heads) continue;
            add(a.d_from_item + ((item_slab + item) * p.heads + h0 + h) * p.padded + r,
                head_sum[h]);
          }
        }
      }
      float c_sum = 0;
      for (int c = 0; c < 2 * at.warps; ++c) c_sum += scalars[2 * at.stride + c * 32 + i];
      if (at.lane == 0) add(a.d_item_c + item_slab + item, c_sum);
    }
    __syncthreads();
    sum_squares(p, at, e, scalars, dz, form, first);
  }

  __syncthreads();
  const int64_t last = int64_t(p.rank) * p.padded;
  for (int r = threadIdx.x; r < p.padded; r += blockDim.x) {
    float sum = 0;
    for (int w = 0; w < at.warps; ++w) sum += sums[w * p.padded + r];
    if (r != p.rank) form[last + r] = sum;
  }
  d_square = block_total(d_square), d_scale = block_total(d_scale), d_blend = block_total(d_blend);
  if (threadIdx.x > 0) return;
  form[last + p.rank] = 2 * d_square;
  if (p.rank < p.padded) form[last + p.padded] = 0;
  a.d_scale[block] = d_scale;
  a.d_blend[block] = d_blend;
}

// Where no pair has an e of its own, the scalar part is all there is. What depends on one index
// alone is a vector.
__device__ __forceinline__ Pair pair_at(const Problem& p, int text, int item) {
  const int64_t at = int64_t(text) * p.items + item;
  const bool by_item = p.form == Form::item;
  return {p.s.square[by_item ? item : text], p.s.text_dot[by_item ? at : text],
          p.s.item_dot[by_item ? item : at], p.s.similarity[at], p.s.text_square[text]};
}

__global__ void __launch_bounds__(128) mix_forward(const __grid_constant__ Problem p) {
  const Place at(p);
  const Mixture mix(p);
  float logits[2];
  for (int i = 0; i < 2; ++i) {
    const int text = min(at.text(blockIdx.y, i), p.texts - 1);
    if (p.form == Form::none) {
      logits[i] = mix.scale * p.s.similarity[int64_t(text) * p.items + at.item_read];
    } else {
      const Cosine c(mix, pair_at(p, text, at.item_read));
      logits[i] = mix.scale * c.cosine * c.rho;
    }
  }
  store_logits(p, at, blockIdx.y, logits);
}

struct MixBackward {
  Problem p;
  float *d_similarity, *d_square, *d_text_dot, *d_item_dot;  // [C, B]; the first as of pairs
  float *d_scale, *d_blend;                                  // of blocks
};

__global__ void __launch_bounds__(128) mix_backward(const __grid_constant__ MixBackward a) {
  const Problem& p = a.p;
  const Place at(p);
  const Mixture mix(p);
  float d_logits[2], d_scale = 0, d_blend = 0;
  load_logits(p, at, blockIdx.y, d_logits);
  for (int i = 0; i < 2; ++i) {
    const int text = at.text(blockIdx.y, i);
    if (text >= p.texts || at.item >= p.items) continue;
    const int64_t to = int64_t(text) * p.items + at.item;
    if (p.form == Form::none) {
      d_scale += d_logits[i] * p.s.similarity[to];
      a.d_similarity[to] = mix.scale * d_logits[i] * p.s.text_scale[text];
      continue;
    }
    const PairGradients d(mix, pair_at(p, text, at.item), d_logits[i]);
    d_scale += d.scale, d_blend += d.blend;
    a.d_similarity[to] = d.similarity * p.s.text_scale[text];
    a.d_square[to] = d.square;
    a.d_text_dot[to] = d.text_dot;
    a.d_item_dot[to] = d.item_dot;
  }
  d_scale = block_total(d_scale), d_blend = block_total(d_blend);
  if (threadIdx.x > 0) return;
  const int block = blockIdx.y * gridDim.x + blockIdx.x;
  a.d_scale[block] = d_scale;
  a.d_blend[block] = d_blend;
}

}  // namespace fastadapters::cuda::head

// The scalar part of a pair: from |u|^2, t u, i u and t i to the logit, and back.
#pragma once

#include "problem.cuh"

namespace fastadapters::cuda::head {

struct Mixture {
  float blend, rest, scale;

  __device__ explicit Mixture(const Problem& p)
      : blend(number(p.op.parameters.blend, p.op.blend_value)),
        rest(p.op.parameters.blend.data ? 1 - blend : p.op.rest_value),
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

// Where a block and its lanes are. Blocks of the same texts follow each other.
struct Place {
  int warps, pairs, stride, lane, warp, item_tile, text_tile, item, item_read;
  __device__ explicit Place(const Problem& p)
      : warps(blockDim.x / 32),
        pairs(64 * warps),
        stride(pairs + 1),  // odd: a column too meets each bank once
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        item_tile(blockIdx.x % item_tiles(p)),
        text_tile(blockIdx.x / item_tiles(p)),
        item(item_tile * 32 + lane),
        item_read(min(item, p.items - 1)) {}
  __device__ int text(int tile, int which) const { return (tile * warps + warp) * 2 + which; }
  __device__ int pair(int which) const { return (2 * warp + which) * 32 + lane; }
};

// The block's logits lie by items in memory: they go through shared memory, [texts of the block,
// 32] with a gap for which reading along the texts meets each bank once.
struct Staged {
  int across, stride, text, item;  // of this thread at first

  __device__ explicit Staged(const Place& at)
      : across(2 * at.warps),
        stride(32 + 32 / across),
        text(threadIdx.x % across),
        item(threadIdx.x / across) {}
};

__device__ __forceinline__ void store_logits(const Problem& p, const Place& at, int tile,
                                             const float (&logits)[2]) {
  __shared__ float staged[8 * 36];
  const Staged s(at);
#pragma unroll
  for (int i = 0; i < 2; ++i) staged[(2 * at.warp + i) * s.stride + at.lane] = logits[i];
  __syncthreads();
  const int text = tile * s.across + s.text;
  for (int i = s.item; i < 32; i += 16) {
    const int item = at.item_tile * 32 + i;
    if (item >= p.items || text >= p.texts) continue;
    store({p.logits, p.op.out_dtype}, int64_t(item) * p.texts + text,
          staged[s.text * s.stride + i]);
  }
}

// ... and their gradients, 0 where there is no such pair. What was staged before has been read.
__device__ __forceinline__ void load_logits(const Problem& p, const Place& at, int tile,
                                            float (&logits)[2]) {
  __shared__ float staged[8 * 36];
  const Staged s(at);
  const int text = tile * s.across + s.text;
  for (int i = s.item; i < 32; i += 16) {
    const int item = at.item_tile * 32 + i;
    const bool there = item < p.items && text < p.texts;
    staged[s.text * s.stride + i] =
        there ? load(p.d_logits, p.op.out_dtype, int64_t(item) * p.texts + text) : 0;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) logits[i] = staged[(2 * at.warp + i) * s.stride + at.lane];
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
    const int text = min(at.text(at.text_tile, i), p.texts - 1);
    if (p.form == Form::none) {
      logits[i] = mix.scale * p.s.similarity[int64_t(text) * p.items + at.item_read];
    } else {
      const Cosine c(mix, pair_at(p, text, at.item_read));
      logits[i] = mix.scale * c.cosine * c.rho;
    }
  }
  store_logits(p, at, at.text_tile, logits);
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
  load_logits(p, at, at.text_tile, d_logits);
  for (int i = 0; i < 2; ++i) {
    const int text = at.text(at.text_tile, i);
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
  d_scale = block_total<0>(d_scale), d_blend = block_total<1>(d_blend);
  if (threadIdx.x > 0) return;
  a.d_scale[blockIdx.x] = d_scale;
  a.d_blend[blockIdx.x] = d_blend;
}

}  // namespace fastadapters::cuda::head

// Backward of the pair stage.
#pragma once

#include "pair.cuh"

namespace fastadapters::cuda::head {

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

// form[i, j] (+)= sum over a block's pairs of factor e_i e_j. A thread has 4 x 4 of them, `across`
// rows and columns apart, on or above the diagonal; threads without any share the pairs of others,
// by eights, so that each meets banks of its own. `room`: 16 numbers a thread, which others read in
// the last round alone, and perhaps still when this returns.
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
  }
}

// Backward, tile by tile of texts for the block's 32 items: everything is computed again but what a
// pair's scalar part needs.
template <bool kShared>
__global__ void __launch_bounds__(128, 2) pair_backward(const __grid_constant__ PairBackward a) {
  extern __shared__ __align__(16) float shared[];
  const Problem& p = a.p;
  const Place at(p);
  const int block = blockIdx.x, vector = p.padded * at.stride;
  float* const e = kShared ? shared : a.scratch + block * a.scratch_size;
  float* const dz = e + vector;  // first the slope of e at z
  float* const weights = dz + vector;
  float* const d_weights = weights + 2 * p.heads * at.stride;  // [H, pairs] by log-odds, at last
  float* const scalars = d_weights + p.heads * at.stride;      // [3, pairs] 2 dq, d(t u), d(i u)
  float* const sums = scalars + 3 * at.stride;                 // [warps, padded] 2 sum dq e
  for (int r = at.lane; r < p.padded; r += 32) sums[at.warp * p.padded + r] = 0;

  const Mixture mix(p);
  const int tiles = (p.texts + 2 * at.warps - 1) / (2 * at.warps);
  const int begin = at.text_tile * a.tiles_per_block, end = min(begin + a.tiles_per_block, tiles);
  float d_scale = 0, d_blend = 0, d_square = 0;
  const int64_t item_slab = int64_t(at.text_tile) * p.items,
                text_slab = int64_t(at.item_tile) * p.texts;
  float* const form = a.d_square_form + block * (int64_t(p.rank + 1) * p.padded + 1);

  for (int tile = begin; tile < end; ++tile) {
    const bool first = tile == begin;
    const int text[2] = {min(at.text(tile, 0), p.texts - 1), min(at.text(tile, 1), p.texts - 1)};
    float d_logits[2];
    load_logits(p, at, tile, d_logits);  // and a barrier: all of the tile before has been read
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
      const int item = at.item_tile * 32 + i;
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

  const int64_t last = int64_t(p.rank) * p.padded;
  for (int r = threadIdx.x; r < p.padded; r += blockDim.x) {
    float sum = 0;
    for (int w = 0; w < at.warps; ++w) sum += sums[w * p.padded + r];
    if (r != p.rank) form[last + r] = sum;
  }
  d_square = block_total<0>(d_square), d_scale = block_total<1>(d_scale);
  d_blend = block_total<2>(d_blend);
  if (threadIdx.x > 0) return;
  form[last + p.rank] = 2 * d_square;
  if (p.rank < p.padded) form[last + p.padded] = 0;
  a.d_scale[block] = d_scale;
  a.d_blend[block] = d_blend;
}

}  // namespace fastadapters::cuda::head

// What is done row by row, a block to each: the image branch around the unit rows of items, and the
// rows of e where it depends on one index alone.
#pragma once

#include "mixture.cuh"
#include "product.cuh"

namespace fastadapters::cuda::head {

constexpr int kItemThreads = 256, kWarps = kItemThreads / 32;

// What backward hands from launch to launch, besides the slabs that are summed.
struct Gradients {
  float* d_similarity = nullptr;                     // [C, B] times text_scale
  float *d_square, *d_text_dot, *d_item_dot;         // [C, B] each, if e depends on one index
  float *d_text_w, *d_text_c, *d_item_w, *d_item_c;  // [C, padded], [C] * text_scale; [B, padded]
  float* d_square_form;                              // [R + 1, padded] + 1
  float *square_sums, *dot_sums, *e_sums;            // [e_slabs][rows of e], ..., [.., padded]
  float *d_e_z, *weighted_e, *weights;               // [rows of e, padded], 2 dq e, 2 dq
  int e_slabs = 1, unit_slabs = 1, key_slabs = 1;
  float* d_unit;                              // [unit_slabs][B, D]
  float *d_item, *d_u, *d_item_z, *d_merged;  // [B, D], [B, D], [B, padded], [B, E]
  float *d_odds_sum, *d_keys, *d_values;      // [H, C], [key_slabs][B, E], [B, E]
  float *d_out, *delta;                       // [C + B, E] by attended, [H, C + B]
  float *d_y, *d_x, *d_hidden;                // [C + B, 3 E], [.., E], [.., down_hidden]
  float* coefficient;                         // [C] of a text in its own gradient
  float* d_blend;                             // [B]
};

struct Rows {
  Problem p;
  Gradients g;
  float scale;  // of the queries
};

// to[i] = row i of the last layer's weight times e, plus its bias, for i < D: a warp has four i at
// a time, a lane an r.
template <class To>
__device__ __forceinline__ void expand(const Problem& p, const float* e, To to) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i0 = 4 * warp; i0 < p.dim; i0 += 4 * kWarps) {
    float sums[4] = {};
    for (int r = lane; r < p.rank; r += 32) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        if (i0 + u < p.dim) sums[u] = fmaf(last_weight(p, i0 + u, r), e[r], sums[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const float sum = warp_sum(sums[u]);
      if (lane == 0 && i0 + u < p.dim) to(i0 + u, sum + load(p.c.data, p.c.dtype, i0 + u));
    }
  }
}

// to(r, sum over i < D of row[i] W[i, r]) for r < padded: a lane has an r, a warp a part of D. As
// exact as it can be: where |u| is small such sums nearly cancel.
template <class To>
__device__ __forceinline__ void contract(const Problem& p, const float* row, To to) {
  __shared__ float parts[2][kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int r0 = 0; r0 < p.padded; r0 += 32) {
    const int r = r0 + lane;
    ExactSum sum;
    if (r < p.rank) {
#pragma unroll 4
      for (int i = warp; i < p.dim; i += kWarps) sum.add(row[i], last_weight(p, i, r));
    }
    parts[0][warp][lane] = sum.sum;
    parts[1][warp][lane] = sum.rest;
    __syncthreads();
    if (warp == 0 && r < p.padded) {
      ExactSum total;
      for (int w = 0; w < kWarps; ++w) total.add(parts[0][w][lane], 1);
      for (int w = 0; w < kWarps; ++w) total.rest += parts[1][w][lane];
      to(r, total.value());
    }
    __syncthreads();
  }
}

// |W e + c|^2 by the factor, which keeps it when the two nearly cancel.
__device__ inline float length_squared(const Problem& p, const float* e) {
  float sum = 0;
  for (int i = threadIdx.x; i < p.rank; i += kItemThreads) {
    float f = p.s.factor[int64_t(p.rank) * p.padded + i];
    for (int j = i; j < p.rank; ++j) f = fmaf(p.s.factor[int64_t(j) * p.padded + i], e[j], f);
    sum = fmaf(f, f, sum);
  }
  const float corner = p.s.factor[int64_t(p.rank + 1) * p.padded];
  return block_total<4>(sum) + corner * corner;
}

__device__ inline float dot(const float* a, const float* b, int stride, int size) {
  float sum = 0;
  for (int i = threadIdx.x; i < size; i += kItemThreads)
    sum = fmaf(a[i], b[int64_t(i) * stride], sum);
  return block_total<5>(sum);
}

// Blocks of items: their unit rows and what the last layer makes of them. Blocks of texts, where e
// depends on the text alone: its two numbers.
__global__ void __launch_bounds__(kItemThreads) rows_forward(const __grid_constant__ Problem p) {
  const State& s = p.s;
  if (int(blockIdx.x) >= p.items) {
    const int text = blockIdx.x - p.items;
    const float* const e = s.e + int64_t(text) * p.padded;
    const float square = length_squared(p, e);
    const float along = dot(e, s.text_w + int64_t(text) * p.padded, 1, p.rank);
    if (threadIdx.x > 0) return;
    s.square[text] = square;
    s.text_dot[text] = along + s.text_c[text];
    return;
  }
  const int item = blockIdx.x;
  float* const u = s.u + int64_t(item) * p.dim;
  float* const unit = s.unit + int64_t(item) * p.dim;
  const Mixture mix(p);
  float sums[2] = {};
  if (p.adapts_item) {
    expand(p, s.item_e + int64_t(item) * p.padded, [&](int i, float value) { u[i] = value; });
    __syncthreads();
  }
  for (int i = threadIdx.x; i < p.dim; i += kItemThreads) {
    const float v = feature(p.op.image, item, i), w = p.adapts_item ? u[i] : 0;
    sums[0] = fmaf(v, v, sums[0]);
    sums[1] = fmaf(w, w, sums[1]);
  }
  const float length = sqrtf(block_total<0>(sums[0])), u_length = sqrtf(block_total<1>(sums[1]));
  const float scale = 1 / fmaxf(length, 1e-12f), u_scale = 1 / fmaxf(u_length, 1e-12f);
  const float from_item = !p.adapts_item               ? scale
                          : p.op.adapt == Adapt::image ? mix.rest
                                                       : mix.rest * scale;
  const float from_u = p.adapts_item ? mix.blend * u_scale : 0;
  float sum = 0;
  for (int i = threadIdx.x; i < p.dim; i += kItemThreads) {
    float v = feature(p.op.image, item, i) * from_item;
    if (p.adapts_item) v = fmaf(u[i], from_u, v);
    unit[i] = v;
    sum = fmaf(v, v, sum);
  }
  const float blended = sqrtf(block_total<2>(sum));
  for (int i = threadIdx.x; i < p.dim; i += kItemThreads) unit[i] /= fmaxf(blended, 1e-12f);
  if (threadIdx.x == 0) {
    s.lengths[item] = u_length;
    s.lengths[p.items + item] = blended;
    s.lengths[2 * p.items + item] = length;
  }
  if (p.form == Form::none) return;
  __syncthreads();
  contract(p, unit, [&](int r, float value) { s.item_w[int64_t(r) * p.items + item] = value; });
  double of_c = 0;  // which what W e gives nearly cancels where |u| is small
  for (int i = threadIdx.x; i < p.dim; i += kItemThreads) {
    of_c = fma(double(unit[i]), double(load(p.c.data, p.c.dtype, i)), of_c);
  }
  const float along_c = float(block_total<3>(of_c));
  if (threadIdx.x == 0) s.item_c[item] = along_c;
  if (p.form != Form::item) return;
  const float* const e = s.e + int64_t(item) * p.padded;
  const float square = length_squared(p, e);
  const float along = dot(e, s.item_w + item, p.items, p.rank);
  if (threadIdx.x > 0) return;
  s.square[item] = square;
  s.item_dot[item] = along + along_c;
}

__device__ inline float sum_slabs(const float* from, int slabs, int64_t size) {
  float sum = 0;
  for (int i = 0; i < slabs; ++i) sum += from[i * size];
  return sum;
}

// to[j] = sum over r of dz[r] inner[r, j]
template <class To>
__device__ __forceinline__ void through_inner(const Problem& p, const float* dz, To to) {
  for (int j = threadIdx.x; j < p.width; j += kItemThreads) {
    float sum = 0;
#pragma unroll 4
    for (int r = 0; r < p.rank; ++r) {
      sum = fmaf(dz[r], load(p.inner_weight.data, p.inner_weight.dtype, int64_t(r) * p.width + j),
                 sum);
    }
    to(j, sum);
  }
}

// A row of e that depends on one index: what its gradient gives to all that made it.
__global__ void __launch_bounds__(kItemThreads) hidden_backward(const __grid_constant__ Rows a) {
  const Problem& p = a.p;
  const Gradients& g = a.g;
  const int row = blockIdx.x, rows = gridDim.x;
  const bool by_item = p.form == Form::item;
  const int64_t at = int64_t(row) * p.padded, slab = int64_t(rows) * p.padded;
  const float factor = 2 * sum_slabs(g.square_sums + row, g.e_slabs, rows);
  const float along = sum_slabs(g.dot_sums + row, g.e_slabs, rows);
  const float* const e = p.s.e + at;
  const float scale = by_item ? 1 : p.s.text_scale[row];
  float* const d_w = (by_item ? g.d_item_w : g.d_text_w) + at;
  for (int r = threadIdx.x; r < p.padded; r += kItemThreads) {
    float de = p.s.square_form[int64_t(p.rank) * p.padded + r];
    for (int j = 0; j < p.rank; ++j) {
      de = fmaf(p.s.square_form[int64_t(j) * p.padded + r], e[j], de);
    }
    const float w = by_item ? p.s.item_w[int64_t(r) * p.items + row] : p.s.text_w[at + r];
    de = fmaf(factor, de, fmaf(along, w, sum_slabs(g.e_sums + at + r, g.e_slabs, slab)));
    g.d_e_z[at + r] = p.gelu ? de * gelu(p.s.z[at + r]).y : de;
    g.weighted_e[at + r] = factor * e[r];
    d_w[r] = along * e[r] * scale;
  }
  if (threadIdx.x == 0) {
    g.weights[row] = factor;
    (by_item ? g.d_item_c : g.d_text_c)[row] = along * scale;
  }
  __syncthreads();
  float* const to = (by_item ? g.d_values : g.d_out) + int64_t(row) * p.width;
  through_inner(p, g.d_e_z + at, [&](int j, float value) { to[j] = value; });
}

// The gradient of a row by its unit row's: below F.normalize's floor it is not projected.
struct UnitGradient {
  float scale, along;  // of the gradient, of the unit row
  __device__ UnitGradient(float dot, float length)
      : scale(1 / fmaxf(length, 1e-12f)), along(length >= 1e-12f ? -dot * scale : 0) {}
  __device__ float operator()(float d, float unit) const { return fmaf(d, scale, along * unit); }
};

__device__ inline void item_backward(const Rows& a, int item) {
  const Problem& p = a.p;
  const Gradients& g = a.g;
  const State& s = p.s;
  const Mixture mix(p);
  const int64_t at = int64_t(item) * p.dim, size = int64_t(p.items) * p.dim;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float u_length = s.lengths[item], blended = s.lengths[p.items + item];
  const float length = s.lengths[2 * p.items + item];
  const bool raw = p.op.adapt == Adapt::image;  // blended as it comes
  const float u_scale = 1 / fmaxf(u_length, 1e-12f), scale = raw ? 1 : 1 / fmaxf(length, 1e-12f);
  float sum = 0;
  for (int i = threadIdx.x; i < p.dim; i += kItemThreads) {
    const float d = sum_slabs(g.d_unit + at + i, g.unit_slabs, size);
    g.d_item[at + i] = d;
    sum = fmaf(d, s.unit[at + i], sum);
  }
  const UnitGradient to_blended(block_total<0>(sum), blended);
  const float own_share = p.adapts_item ? mix.rest : 1;
  float along_u = 0, along_item = 0;
  for (int i = threadIdx.x; i < p.dim; i += kItemThreads) {
    const float d = to_blended(g.d_item[at + i], s.unit[at + i]);
    g.d_item[at + i] = d;
    if (p.adapts_item) along_u = fmaf(d, s.u[at + i] * u_scale, along_u);
    along_item = fmaf(d, feature(p.op.image, item, i) * scale, along_item);
  }
  along_u = block_total<1>(along_u), along_item = block_total<2>(along_item);
  if (threadIdx.x == 0) g.d_blend[item] = p.adapts_item ? along_u - along_item : 0;
  const UnitGradient to_u(mix.blend * along_u, u_length);
  const UnitGradient to_item(own_share * along_item, length);
  for (int i = threadIdx.x; i < p.dim; i += kItemThreads) {
    const float d = g.d_item[at + i], v = feature(p.op.image, item, i) * scale;
    if (p.adapts_item) g.d_u[at + i] = to_u(mix.blend * d, s.u[at + i] * u_scale);
    g.d_item[at + i] = raw ? mix.rest * d : to_item(own_share * d, v);
  }
  if (p.adapts_item) {
    __syncthreads();
    float* const dz = g.d_item_z + int64_t(item) * p.padded;
    const float* const z = s.item_z + int64_t(item) * p.padded;
    contract(p, g.d_u + at,
             [&](int r, float value) { dz[r] = p.gelu ? value * gelu(z[r]).y : value; });
    float* const to = g.d_merged + int64_t(item) * p.width;
    through_inner(p, dz, [&](int j, float value) { to[j] = value; });
  }
  __syncthreads();

  // Its attention over the texts and itself, a warp to each head.
  const int query = p.texts + item;
  const bool texts = p.adapts_item && p.op.bias[1][0] > kBlocked;
  const bool itself = p.adapts_item && p.op.bias[1][1] > kBlocked;
  const bool of_text = p.form == Form::pair || (p.form == Form::item && p.op.bias[0][1] > kBlocked);
  for (int h = warp; h < p.heads; h += kWarps) {
    const int64_t y_at = int64_t(query) * 3 * p.width + h * p.depth;
    const int64_t row = int64_t(item) * p.width + h * p.depth;
    const float *const q = s.y + y_at, *const k = q + p.width, *const v = k + p.width;
    const float* const out = s.attended + int64_t(query) * p.width + h * p.depth;
    const float* const d = g.d_merged + row;
    float own = 0, along = 0, of_texts = 0;
    for (int j = lane; j < p.depth; j += 32) {
      if (texts) of_texts = fmaf(d[j], out[j], of_texts);
      if (texts && itself) {
        own = fmaf(q[j], k[j], own);
        along = fmaf(d[j], v[j] - out[j], along);
      }
    }
    own = warp_sum(own), along = warp_sum(along), of_texts = warp_sum(of_texts);
    float2 weight = {itself ? 1.0f : 0.0f, texts ? 1.0f : 0.0f};
    const int64_t lse_at = int64_t(h) * p.rows + query;
    if (texts && itself) {
      weight = sigmoids(own + p.op.bias[1][1] - p.op.bias[1][0] - s.lse[lse_at]);
    }
    const float d_odds = texts && itself ? weight.x * weight.y * along : 0;
    if (texts && lane == 0) g.delta[lse_at] = fmaf(weight.y, of_texts, d_odds);
    for (int j = lane; j < p.depth; j += 32) {
      float dk = d_odds * q[j], dv = itself ? weight.x * d[j] : 0;
      if (p.form == Form::pair) {
        dk += sum_slabs(g.d_keys + row + j, g.key_slabs, int64_t(p.items) * p.width);
      }
      if (of_text) dv += g.d_values[row + j];
      g.d_y[y_at + j] = d_odds * k[j] * a.scale;
      g.d_y[y_at + p.width + j] = dk;
      g.d_y[y_at + 2 * p.width + j] = dv;
      if (texts) g.d_out[int64_t(query) * p.width + h * p.depth + j] = weight.y * d[j];
    }
  }
}

// Blocks of items; then, for queries of texts, what their attention's gradient subtracts: a warp to
// each text and head.
__global__ void __launch_bounds__(kItemThreads) rows_backward(const __grid_constant__ Rows a) {
  const Problem& p = a.p;
  if (int(blockIdx.x) < p.items) return item_backward(a, blockIdx.x);
  const int task = (blockIdx.x - p.items) * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (task >= p.texts * p.heads) return;
  const int text = task / p.heads, h = task % p.heads;
  const int64_t at = int64_t(text) * p.width + h * p.depth;
  float sum = 0;
  for (int j = lane; j < p.depth; j += 32) sum = fmaf(a.g.d_out[at + j], p.s.attended[at + j], sum);
  sum = warp_sum(sum);
  if (p.form == Form::pair) sum += a.g.d_odds_sum[int64_t(h) * p.texts + text];
  if (lane == 0) a.g.delta[int64_t(h) * p.rows + text] = sum;
}

// What a text's own gradient takes from it: the projection of its unit row's; below the floor of
// its length, what comes through |t|^2.
__device__ inline void text_coefficient(const Problem& p, const Gradients& g, int text) {
  const int lane = threadIdx.x % 32;
  const float scale = p.s.text_scale[text];
  float sum = 0;
  if (p.s.text_square[text] == 1) {
    for (int b = lane; b < p.items; b += 32) {
      const int64_t at = int64_t(text) * p.items + b;
      sum = fmaf(g.d_similarity[at], p.s.similarity[at], sum);
    }
    for (int r = lane; p.form != Form::none && r < p.padded; r += 32) {
      const int64_t at = int64_t(text) * p.padded + r;
      sum = fmaf(g.d_text_w[at], p.s.text_w[at], sum);
    }
    sum = warp_sum(sum);
    if (p.form != Form::none) sum = fmaf(g.d_text_c[text], p.s.text_c[text], sum);
    sum *= -scale;
  } else if (p.form != Form::none) {
    const Mixture mix(p);
    for (int b = lane; b < p.items; b += 32) {
      Pair pair;
      if (p.form == Form::pair) {
        const int64_t at = int64_t(text) * p.items + b;
        pair = {p.s.square[at], p.s.text_dot[at], p.s.item_dot[at], p.s.similarity[at],
                p.s.text_square[text]};
      } else {
        pair = pair_at(p, text, b);
      }
      const float d_logit = load(p.d_logits, p.op.out_dtype, int64_t(b) * p.texts + text);
      sum += PairGradients(mix, pair, d_logit).m;
    }
    sum = 2 * mix.rest * mix.rest * scale * (scale * warp_sum(sum));
  }
  if (lane == 0) g.coefficient[text] = sum;
}

}  // namespace fastadapters::cuda::head

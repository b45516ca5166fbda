// Text queries over the images: the results of every item, and in backward what its d_out gives.
//
// What the texts make of the texts, whatever the item, is merged with the images of the item by
// their log-sum-exps: of an item's result a share w is that of the texts.
#pragma once

#include "columns.cuh"

namespace fastadapters::cuda::attention {

struct TextOut : Problem {
  Tokens text_out;
  int tiles = 0;  // of a group
  int items_of_block = 1;
};

// A query's attention over the texts: values is its sum / total, of weights to top.
template <class C>
struct OverTexts {
  C values;
  float top = -INFINITY, total = 0;

  __device__ __forceinline__ void load(const Problem& p, int group, int head, int row) {
    if (!p.sees[kText][kText]) return;
    const float2 found = p.softmax[kText][numbers_of(p, kText, group, head) + row];
    top = found.x;
    total = 1 / found.y;
    values.template load<Full>(p.out[kText] + values_of(p, kText, group, head, row), p.width,
                               p.width % 4 == 0);
  }
};

template <class E, class C>
__device__ __forceinline__ void load_image(C& to, const Problem& p, const Tokens& t, int group,
                                           int head, int image) {
  to.template load<E>(row_of(t, group, head, image), p.width, t.aligned);
}

// A few lanes have a row of text_out [C, H], some items one after another.
template <class E, int kWidth>
__global__ void __launch_bounds__(kRowThreads) text_out(const __grid_constant__ TextOut p) {
  using C = Columns<E, kWidth>;
  const int tile = blockIdx.x % p.tiles, rest = blockIdx.x / p.tiles;
  const int group = rest % p.groups, begin = rest / p.groups * p.items_of_block;
  const int64_t at = int64_t(tile) * C::kRowsOfBlock + threadIdx.x / C::kLanes;
  const int row = int(min(at / p.heads, int64_t(p.rows[kText] - 1))), head = int(at % p.heads);
  const bool images = p.sees[kText][kImage];

  C q;
  if (images) q.template load<E>(row_of(p.q[kText], group, head, row), p.width, p.q[kText].aligned);
  OverTexts<C> texts;
  texts.load(p, group, head, row);
  for (int item = begin; item < min(begin + p.items_of_block, p.items); ++item) {
    float top = texts.top, total = texts.total;
    C out = texts.values;
    out.each([&](float& v) { v *= total; });
    for (int i = item * p.images; images && i < (item + 1) * p.images; ++i) {
      C k, v;
      load_image<E>(v, p, p.v[kImage], group, head, i);
      if (!p.single[kText]) load_image<E>(k, p, p.k[kImage], group, head, i);
      const float score = fmaf(q.dot(k), p.scale, p.add[kText][kImage]);
      const float higher = fmaxf(top, score);
      const float keep = exp2f(top - higher), weight = exp2f(score - higher);
      top = higher;
      total = fmaf(total, keep, weight);
      out.each([&](float& sum, float value) { sum = fmaf(weight, value, sum * keep); }, v);
    }
    const float factor = total > 0 ? 1 / total : 0;
    out.each([&](float& v) { v *= factor; });
    if (at < int64_t(p.rows[kText]) * p.heads) {
      out.template store<E>(row_of(p.text_out, group * p.items + item, head, row), p.width,
                            p.text_out.aligned);
    }
  }
}

// Sums are slabs, a split of the items or a tile of texts apart. Each may be absent.
struct TextImages : Problem {
  Tokens d_out;
  int tiles = 0, splits = 1, items_of_split = 1;
  float* d_texts = nullptr;  // [splits, groups, C, H, d]: of w d_out
  float* d_delta = nullptr;  // [splits, groups, H, C]: of w delta
  float* dq = nullptr;       // [splits, groups, C, H, d], before the scale
  float* dk = nullptr;       // [tiles, groups, items * images, H, d], before the scale
  float* dv = nullptr;
};

// Where column `column` of some sums lies in shared memory, so that every access meets each bank
// once.
__device__ __forceinline__ int sum_place(int column) { return column ^ (column / 32 % 2 * 4); }

// to[column] = the sum over the rows of a warp. Lanes of different rows exchange half of what they
// have until each has a few neighbouring columns.
template <class C>
__device__ __forceinline__ void sum_columns(const C& values, float* to) {
  constexpr int kLeft = C::kLanes / 2;
  float sums[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) sums[i] = values.at[i / C::kN][i % C::kN];
  int first = 0;
#pragma unroll
  for (int step = 16, left = 8; step >= C::kLanes; step /= 2, left /= 2) {
    const bool upper = threadIdx.x & step;
    first += upper ? left : 0;
#pragma unroll
    for (int i = 0; i < left; ++i) {
      const float send = upper ? sums[i] : sums[i + left];
      const float keep = upper ? sums[i + left] : sums[i];
      sums[i] = keep + __shfl_xor_sync(0xffffffff, send, step);
    }
  }
  struct alignas(4 * kLeft) Left {
    float at[kLeft];
  } left;
#pragma unroll
  for (int i = 0; i < kLeft; ++i) left.at[i] = sums[i];
  const int column = C::column(first / C::kN) + first % C::kN;
  *reinterpret_cast<Left*>(to + sum_place(column)) = left;
}

// Block (split of the items, group, tile of texts, head) reads its part of d_out, once.
template <class E, int kWidth>
__global__ void __launch_bounds__(kRowThreads) text_images(const __grid_constant__ TextImages p) {
  using C = Columns<E, kWidth>;
  constexpr int kWarps = kRowThreads / 32;
  __shared__ float sums[2][kWarps][2 * kWidth];
  const int head = blockIdx.x % p.heads, tile = blockIdx.x / p.heads % p.tiles;
  const int rest = blockIdx.x / p.heads / p.tiles, group = rest % p.groups, split = rest / p.groups;
  const int row = tile * C::kRowsOfBlock + threadIdx.x / C::kLanes;
  const bool there = row < p.rows[kText];
  const bool images = p.sees[kText][kImage], column_sums = images && (p.dk || p.dv);

  C q, d_texts, dq;
  OverTexts<C> texts;
  if (there) {
    q.template load<E>(row_of(p.q[kText], group, head, row), p.width, p.q[kText].aligned);
    texts.load(p, group, head, row);
  }
  if (!there) texts.top = 0, texts.total = 1;
  float d_delta = 0;
  int buffer = 0;
  const int begin = split * p.items_of_split;
  for (int item = begin; item < min(begin + p.items_of_split, p.items); ++item) {
    C d_out, k, v;
    if (there) {
      d_out.template load<E>(row_of(p.d_out, group * p.items + item, head, row), p.width,
                             p.d_out.aligned);
    }
    float top = texts.top, total = texts.total, delta = total * d_out.dot(texts.values);
    float score = 0, by_weight = 0;
    const auto meet = [&](int i) {
      load_image<E>(k, p, p.k[kImage], group, head, item * p.images + i);
      load_image<E>(v, p, p.v[kImage], group, head, item * p.images + i);
      score = fmaf(q.dot(k), p.scale, p.add[kText][kImage]);
      by_weight = d_out.dot(v);
    };
    for (int i = 0; images && i < p.images; ++i) {
      meet(i);
      const float higher = fmaxf(top, score);
      const float keep = exp2f(top - higher), weight = exp2f(score - higher);
      top = higher;
      total = fmaf(total, keep, weight);
      delta = fmaf(delta, keep, weight * by_weight);
    }
    const float share = 1 / total;
    delta *= share;
    if (p.d_texts) {
      const float w = texts.total * exp2f(texts.top - top) * share;
      d_texts.each([&](float& sum, float d) { sum = fmaf(w, d, sum); }, d_out);
      d_delta = fmaf(w, delta, d_delta);
    }
    for (int i = 0; images && i < p.images; ++i) {
      if (p.images > 1) meet(i);
      const float weight = exp2f(score - top) * share;
      const float d_score = p.single[kText] ? 0 : weight * (by_weight - delta);
      dq.each([&](float& sum, float key) { sum = fmaf(d_score, key, sum); }, k);
      if (!column_sums) continue;
      float* const of_warp = sums[buffer][threadIdx.x / 32];
      if (p.dk) {
        C product = q;
        product.each([&](float& value) { value *= d_score; });
        sum_columns(product, of_warp);
      }
      if (p.dv) {
        C product = d_out;
        product.each([&](float& value) { value *= weight; });
        sum_columns(product, of_warp + kWidth);
      }
      __syncthreads();
      const int column = threadIdx.x % kWidth;
      float* const to = int(threadIdx.x) < kWidth ? p.dk : p.dv;
      if (int(threadIdx.x) < 2 * kWidth && column < p.width && to) {
        float sum = 0;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) {
          sum += sums[buffer][warp][int(threadIdx.x) - column + sum_place(column)];
        }
        const int64_t slab = int64_t(tile) * p.groups * p.rows[kImage] * p.heads * p.width;
        to[slab + values_of(p, kImage, group, head, item * p.images + i) + column] = sum;
      }
      buffer ^= 1;
    }
  }
  if (!there) return;
  const int64_t slab = int64_t(split) * p.groups * p.rows[kText] * p.heads;
  const int64_t to = slab * p.width + values_of(p, kText, group, head, row);
  const bool aligned = p.width % 4 == 0;
  if (p.d_texts) {
    d_texts.template store<Full>(p.d_texts + to, p.width, aligned);
    if (threadIdx.x % C::kLanes == 0) {
      p.d_delta[slab + numbers_of(p, kText, group, head) + row] = d_delta;
    }
  }
  if (p.dq) dq.template store<Full>(p.dq + to, p.width, aligned);
}

}  // namespace fastadapters::cuda::attention

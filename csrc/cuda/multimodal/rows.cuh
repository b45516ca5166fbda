// The parts of a launch that are no products: lengths of rows, vectors, the Gram matrix of the last
// layer and its factor. A warp has a row.
#pragma once

#include "problem.cuh"
#include "product.cuh"

namespace fastadapters::cuda::head {

// 1 / |t| and |t|^2 of a unit row, with F.normalize's floor of 1e-12 on the length.
__device__ inline void text_length(const Problem& p, int row) {
  float sum = 0;
  for (int i = threadIdx.x % 32; i < p.dim; i += 32) {
    const float v = feature(p.op.text, row, i);
    sum = fmaf(v, v, sum);
  }
  const float length = sqrtf(warp_sum(sum)), scale = 1 / fmaxf(length, 1e-12f);
  if (threadIdx.x % 32 != 0) return;
  p.s.text_scale[row] = scale;
  p.s.text_square[row] = length >= 1e-12f ? 1 : length * scale * (length * scale);
}

// Of two composed layers: W1 b_out + b1.
__device__ inline void inner_bias(const Problem& p, int row) {
  const MultimodalParameters& w = p.op.parameters;
  float sum = 0;
  for (int i = threadIdx.x % 32; i < p.width; i += 32) {
    sum = fmaf(load(w.up_weight.data, w.up_weight.dtype, int64_t(row) * p.width + i),
               load(w.out_bias.data, w.out_bias.dtype, i), sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) {
    p.s.inner_bias[row] = sum + load(w.up_bias.data, w.up_bias.dtype, row);
  }
}

// Elements (i, j >= i) of the Gram matrix, lane by lane along j. In double, as u may nearly vanish.
__device__ inline void gram_row(const Problem& p, int task) {
  const int size = p.rank + 1, across = (size + 31) / 32;
  const int i = task / across, j = task % across * 32 + threadIdx.x % 32;
  if (j < i || j >= size) return;
  const auto element = [&](int row, int r) {
    return r < p.rank ? last_weight(p, row, r) : load(p.c.data, p.c.dtype, row);
  };
  double sum = 0;
#pragma unroll 8
  for (int row = 0; row < p.dim; ++row) {
    sum = fma(double(element(row, i)), double(element(row, j)), sum);
  }
  p.s.gram[int64_t(i) * size + j] = sum;
}

// The upper triangle of the Gram matrix becomes its factor U, U^T U = gram, by one block: without a
// square root until the end, so with one barrier a row. A pivot that is but rounding errors gives a
// row of zeros. `work`: room for the matrix.
__device__ inline void factorise(const Problem& p, double* work) {
  const int size = p.rank + 1, padded = p.padded;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto diagonal = [&](int k) -> float& {  // of the matrix, where the factor's will be
    return p.s.factor[int64_t(k) * padded + (k < p.rank ? k : padded)];
  };
  for (int i = warp; i < size; i += kThreads / 32) {
    for (int j = lane; j < max(size, padded); j += 32) {
      const double value = j < size ? p.s.gram[int64_t(min(i, j)) * size + max(i, j)] : 0;
      if (j >= i && j < size) work[int64_t(i) * size + j] = value;
      if (j == i) diagonal(i) = float(value);
      if (j < padded) p.s.square_form[int64_t(i) * padded + j] = j < p.rank ? float(value) : 0;
    }
  }
  const auto pivot_of = [&](int k) {
    const double pivot = work[int64_t(k) * size + k];
    return pivot > 1e-14 * diagonal(k) ? pivot : 0;
  };
  for (int k = 0; k < size; ++k) {
    __syncthreads();
    const double pivot = pivot_of(k), inverse = pivot > 0 ? 1 / pivot : 0;
    const double* const row = work + int64_t(k) * size;
    for (int i = k + 1 + warp; i < size; i += kThreads / 32) {
      const double factor = row[i] * inverse;
      for (int j = i + lane; j < size; j += 32) {
        work[int64_t(i) * size + j] = fma(-factor, row[j], work[int64_t(i) * size + j]);
      }
    }
  }
  // Each warp writes columns of its own, whose diagonal elements it alone needs.
  for (int i = warp; i < size; i += kThreads / 32) {
    const double pivot = pivot_of(i), scale = pivot > 0 ? 1 / sqrt(pivot) : 0;
    __syncwarp();
    for (int j = lane; j < size; j += 32) {
      const float value = j >= i ? float(work[int64_t(i) * size + j] * scale) : 0;
      if (i < p.rank) p.s.factor[int64_t(j) * padded + i] = value;
      if (i == p.rank && j == i) diagonal(i) = value;
    }
  }
  for (int i = threadIdx.x; i < size * (padded - p.rank); i += kThreads) {
    const int j = i / (padded - p.rank), column = p.rank + i % (padded - p.rank);
    p.s.factor[int64_t(j) * padded + column] = 0;
  }
}

}  // namespace fastadapters::cuda::head

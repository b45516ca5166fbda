// dWu of a block's rows, accumulated in shared memory while dy is there for dz.
#pragma once

#include "../product.cuh"
#include "walk.cuh"

namespace fastadapters::cuda {

// dy^T h [D, units] and the sums of dy [D], in fp32. Each thread has elements of its own, in the
// order of the accumulators of its products: it meets each bank once and needs no barrier. A warp
// has 16 columns of each chunk of D.
template <class E, class Y>
struct UpGradient {
  static constexpr int kChunk = kLine / int(sizeof(typename E::T));
  static_assert(kChunk == 16 * kThreads / 32);
  float4* products;  // [chunks, units / 8, kThreads]
  float* sums;       // [chunks, kChunk]
  int units;

  __device__ __forceinline__ UpGradient(char* place, const DataPass& p)
      : products(reinterpret_cast<float4*>(place)),
        sums(reinterpret_cast<float*>(place) + p.out_chunks * kChunk * p.units),
        units(p.units) {}

  static __device__ __forceinline__ int column(int chunk) {
    return chunk * kChunk + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  }

  __device__ __forceinline__ void clear(int chunks) {
    for (int i = 0; i < chunks * units / 8; ++i) products[i * kThreads + threadIdx.x] = {};
    if (threadIdx.x % 4 != 0) return;
    for (int i = 0; i < chunks; ++i) sums[column(i)] = sums[column(i) + 8] = 0;
  }

  // `dy`: the panels of a chunk; `h`: panels that begin with its first column.
  __device__ __forceinline__ void add(const char* dy, const char* h, int first, int chunk) {
    const float no_shift[1][2] = {};
    for (int n = 0; n < units; n += 16) {
      float4* const place = products + (chunk * units + n) / 8 * kThreads + threadIdx.x;
      const bool both = n + 8 < units;
      const float4 a = place[0], b = both ? place[kThreads] : float4{};
      float acc[1][2][4] = {{{a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w}}}, total[1][4] = {};
      multiply<E, kRows* int(sizeof(typename E::T)) / 32, true, true, Y, true>(
          acc, {dy, kPanel, int(threadIdx.x / 32 * 16)}, {h, kPanel, first + n}, no_shift, total);
      const auto& [c, d] = acc[0];
      place[0] = {c[0], c[1], c[2], c[3]};
      if (both) place[kThreads] = {d[0], d[1], d[2], d[3]};
      if (n == 0 && threadIdx.x % 4 == 0) {
        sums[column(chunk)] += total[0][0];
        sums[column(chunk) + 8] += total[0][2];
      }
    }
  }

  __device__ __forceinline__ void store(const DataPass& p) const {
    for (int i = 0; i < p.out_chunks * units / 8; ++i) {
      const float4 v = products[i * kThreads + threadIdx.x];
      const int d = column(i / (units / 8));
      float* const to = p.up_products + (int64_t(blockIdx.x) * p.out_dim + d) * units +
                        i % (units / 8) * 8 + threadIdx.x % 4 * 2;
      if (d < p.out_dim) *reinterpret_cast<float2*>(to) = {v.x, v.y};
      if (d + 8 < p.out_dim) *reinterpret_cast<float2*>(to + 8 * units) = {v.z, v.w};
    }
    if (threadIdx.x % 4 != 0) return;
    for (int i = 0; i < p.out_chunks; ++i) {
      float* const to = p.up_sums + int64_t(blockIdx.x) * p.out_dim;
      if (column(i) < p.out_dim) to[column(i)] = sums[column(i)];
      if (column(i) + 8 < p.out_dim) to[column(i) + 8] = sums[column(i) + 8];
    }
  }
};

}  // namespace fastadapters::cuda

// A row of a head in the registers of a few lanes, 16 columns each.
#pragma once

#include "problem.cuh"

namespace fastadapters::cuda::attention {

constexpr int kRowThreads = 256;  // of a block

// Of heads of up to kWidth whose rows are read as E: the lanes of a row take turns, 16 bytes each.
template <class E, int kWidth>
struct Columns {
  static constexpr int kLanes = kWidth / 16;  // of a row
  static constexpr int kRowsOfBlock = kRowThreads / kLanes;
  static constexpr int kN = 16 / sizeof(typename E::T), kSegments = 16 / kN;
  float at[kSegments][kN] = {};

  static __device__ __forceinline__ int column(int segment) {
    return (segment * kLanes + int(threadIdx.x) % kLanes) * kN;
  }

  // From a row stored as S.
  template <class S>
  __device__ __forceinline__ void load(const void* row, int width, bool aligned) {
    using T = typename S::T;
    constexpr int kPart = 16 / sizeof(T);
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      const T* const from = static_cast<const T*>(row) + column(s);
      const int valid = width - column(s);
      if (aligned && valid >= kN) {
#pragma unroll
        for (int i = 0; i < kN; i += kPart) {
          float part[kPart];
          load_segment<S>(from + i, part);
#pragma unroll
          for (int e = 0; e < kPart; ++e) at[s][i + e] = part[e];
        }
      } else {
#pragma unroll
        for (int i = 0; i < kN; ++i) at[s][i] = i < valid ? float(from[i]) : 0;
      }
    }
  }

  template <class S>
  __device__ __forceinline__ void store(void* row, int width, bool aligned) const {
    using T = typename S::T;
    constexpr int kPart = 16 / sizeof(T);
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      T* const to = static_cast<T*>(row) + column(s);
      const int valid = width - column(s);
      if (aligned && valid >= kN) {
#pragma unroll
        for (int i = 0; i < kN; i += kPart) {
          float part[kPart];
#pragma unroll
          for (int e = 0; e < kPart; ++e) part[e] = at[s][i + e];
          store_segment<S>(to + i, part);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          if (i < valid) to[i] = T(at[s][i]);
        }
      }
    }
  }

  // f(an element of this, that of each other)
  template <class F, class... Others>
  __device__ __forceinline__ void each(F f, const Others&... others) {
#pragma unroll
    for (int i = 0; i < 16; ++i) f(at[i / kN][i % kN], others.at[i / kN][i % kN]...);
  }

  // Over the whole row; all lanes of a warp take part.
  __device__ __forceinline__ float dot(const Columns& other) const {
    float sums[2] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      sums[i % 2] = fmaf(at[i / kN][i % kN], other.at[i / kN][i % kN], sums[i % 2]);
    }
    float sum = sums[0] + sums[1];
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    return sum;
  }
};

}  // namespace fastadapters::cuda::attention

// z, h and their gradients [M, r] as a thread of the data pass has them.
#pragma once

#include "problem.cuh"

namespace fastadapters::cuda {

// The elements [i / 2][n][i % 2 * 2] and the next of a warp's 32 rows: columns `column` + 8 n and
// the next, which is odd, of rows `row` + 8 i.
template <class E, int kN>
struct Hidden {
  using T = typename E::T;
  static constexpr int kSize = sizeof(T);
  int bottleneck, column, row, rows;

  __device__ __forceinline__ Hidden(int bottleneck, int column, int row, int rows)
      : bottleneck(bottleneck), column(column), row(row), rows(rows) {}

  // From [M, r]; zeros beyond.
  __device__ __forceinline__ void load(float (&to)[2][kN][4], const char* from) const {
    const bool even = bottleneck % 2 == 0;
#pragma unroll
    for (int i = 0; i < 4 * kN; ++i) {
      const int at = column + i % kN * 8, m = row + i / kN * 8;
      const char* const source = from + (int64_t(m) * bottleneck + at) * kSize;
      float2 v = {0, 0};
      if (m < rows && at < bottleneck) {
        if (even) {
          v = load_pair<E>(source);
        } else {
          v.x = float(*reinterpret_cast<const T*>(source));
          if (at + 1 < bottleneck) v.y = float(*reinterpret_cast<const T*>(source + kSize));
        }
      }
      float* const target = to[i / kN / 2][i % kN] + i / kN % 2 * 2;
      target[0] = v.x, target[1] = v.y;
    }
  }

  __device__ __forceinline__ void store(char* to, const float (&from)[2][kN][4]) const {
    const bool even = bottleneck % 2 == 0;
#pragma unroll
    for (int i = 0; i < 4 * kN; ++i) {
      const int at = column + i % kN * 8, m = row + i / kN * 8;
      char* const target = to + (int64_t(m) * bottleneck + at) * kSize;
      const float* const v = from[i / kN / 2][i % kN] + i / kN % 2 * 2;
      if (m < rows && at < bottleneck) {
        if (even) {
          store_pair<E>(target, v[0], v[1]);
        } else {
          *reinterpret_cast<T*>(target) = T(v[0]);
          if (at + 1 < bottleneck) *reinterpret_cast<T*>(target + kSize) = T(v[1]);
        }
      }
    }
  }

  // To [M, width].
  __device__ __forceinline__ void store_padded(char* to, int width, int i, int n, float a,
                                               float b) const {
    const int m = row + 8 * i, at = column + 8 * n;
    if (m < rows && at < width) store_pair<E>(to + (int64_t(m) * width + at) * kSize, a, b);
  }

  // Which elements dropout keeps, as bits in the order i, n, column. row_at(place): a row's number.
  template <class RowAt>
  __device__ __forceinline__ uint32_t kept(const Dropout& dropout, RowAt row_at) const {
    uint32_t bits = 0;
#pragma unroll 1
    for (int i = 0; i < 4 * kN; ++i) {
      const int at = column + i % kN * 8;
      const uint32_t four = dropout.kept(row_at(row + i / kN * 8), at & ~3, bottleneck);
      bits |= (four >> at % 4 & 3) << 2 * i;
    }
    return bits;
  }

  // Dropout, and zeros beyond r, where an infinite x or dy has met zeros.
  __device__ __forceinline__ void mask(float (&values)[2][kN][4], const Dropout& dropout,
                                       uint32_t bits) const {
#pragma unroll
    for (int i = 0; i < 8 * kN; ++i) {
      const int n = i / 2 % kN;
      float& value = values[i / (4 * kN)][n][i / (2 * kN) % 2 * 2 + i % 2];
      if (column + 8 * n + i % 2 >= bottleneck) value = 0;
      if (dropout.seed) value *= bits >> i & 1 ? dropout.keep : 0;
    }
  }
};

}  // namespace fastadapters::cuda

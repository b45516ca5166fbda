// Dropout of h and of what is projected down: its bits, made anew wherever they are needed.
#pragma once

#include "../../philox.h"
#include "../tile.cuh"

namespace fastadapters::cuda {

// Dropout of a tensor [M, columns]; there is none without a seed.
struct Dropout {
  const int64_t* seed = nullptr;  // [2]: key and offset
  int stream = 0;                 // added to the offset
  uint32_t threshold = 0;
  float keep = 1;  // what is kept is multiplied by

  // Which elements are kept, as bits: of a row those from `column`, a multiple of 4, to the third
  // after it.
  __device__ __forceinline__ uint32_t kept(int64_t row, int column, int columns) const {
    const PhiloxBlock block = philox4x32(seed[0], row * ((columns + 3) / 4) + column / 4,
                                         uint64_t(seed[1]) + uint64_t(stream));
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= uint32_t(block.lane[i] >= threshold) << i;
    return bits;
  }

  // On elements side by side.
  template <int kN>
  __device__ __forceinline__ void apply(float (&v)[kN], int64_t row, int column,
                                        int columns) const {
#pragma unroll
    for (int i = 0; i < kN; i += 4) {
      const uint32_t bits = kept(row, column + i, columns);
#pragma unroll
      for (int e = 0; e < 4; ++e) v[i + e] *= bits >> e & 1 ? keep : 0;
    }
  }
};

// Input dropout on the gradients of a warp's 32 rows and 8 kN columns of x [M, columns], from
// `column` on, which has them as products do. Each lane makes the bits of one row, its `row`.
template <int kN>
__device__ __forceinline__ void drop_gradients(const Dropout& dropout, float (&out)[2][kN][4],
                                               int64_t row, int column, int columns) {
  const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
  uint32_t bits = 0;
#pragma unroll 1
  for (int i = 0; i < 8 * kN; i += 4) {
    bits |= dropout.kept(row, column + i, columns) << i;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t own = __shfl_sync(0xffffffff, bits, 8 * i + group) >> 2 * pair;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        out[i / 2][n][i % 2 * 2 + e] *= own >> (8 * n + e) & 1 ? dropout.keep : 0;
      }
    }
  }
}

}  // namespace fastadapters::cuda

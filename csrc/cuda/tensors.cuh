// Tensors in global memory: what kernels are told about them, single elements and vectors.
#pragma once

#include <type_traits>

#include "../tensors.h"
#include "tile.cuh"

namespace fastadapters::cuda {

// [M, D] activations; strides in bytes. `uniform`: all rows are strides[2] apart.
struct Activations {
  char* data = nullptr;
  int64_t strides[3] = {0, 0, 0};
  bool uniform = true;
  bool aligned = true;  // every row starts on 16 bytes
};

// [rows, columns] in the compute dtype, rows on 16 bytes.
struct Matrix {
  const char* data = nullptr;
  int64_t stride = 0;  // bytes
};

// A parameter, rounded to the compute dtype as it is read; one made on the way (`exact`) is not.
struct Vector {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  bool exact = false;
};

template <class E>
__device__ __forceinline__ float load(const Vector& v, int64_t i) {
  float value = 0;
  switch (v.dtype) {
    case Dtype::float32:
      value = static_cast<const float*>(v.data)[i];
      break;
    case Dtype::bfloat16:
      value = __bfloat162float(static_cast<const __nv_bfloat16*>(v.data)[i]);
      break;
    case Dtype::float16:
      value = __half2float(static_cast<const __half*>(v.data)[i]);
      break;
  }
  return v.exact ? value : E::round(value);
}

__device__ __forceinline__ void store(const Parameter& to, int64_t i, float value) {
  switch (to.dtype) {
    case Dtype::float32:
      static_cast<float*>(to.data)[i] = value;
      break;
    case Dtype::bfloat16:
      static_cast<__nv_bfloat16*>(to.data)[i] = __float2bfloat16_rn(value);
      break;
    case Dtype::float16:
      static_cast<__half*>(to.data)[i] = __float2half_rn(value);
      break;
  }
}

// Elements first + 8 n and the next of a vector, rounded like it; 0 from `limit` on and if it is
// absent.
template <class E, int kN>
__device__ __forceinline__ void load_columns(float (&to)[kN][2], const Vector& v, int first,
                                             int limit) {
  const auto fill = [&](auto element) {
    const auto* const data = static_cast<const decltype(element)*>(v.data) + first;
#pragma unroll
    for (int i = 0; i < 2 * kN; ++i) {
      const int at = i / 2 * 8 + i % 2;
      const float value = v.data && first + at < limit ? float(data[at]) : 0;
      constexpr bool kRound = !std::is_same_v<decltype(element), typename E::T>;
      to[i / 2][i % 2] = !kRound || v.exact ? value : E::round(value);
    }
  };
  if (v.dtype == Dtype::float32) {
    fill(float{});
  } else if (v.dtype == Dtype::bfloat16) {
    fill(__nv_bfloat16{});
  } else {
    fill(__half{});
  }
}

// Sums over one block, in a fixed order; thread 0 has the result.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float warps[8];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (int i = 0; i < 8; ++i) value += warps[i];
  return value;
}

}  // namespace fastadapters::cuda

// What every kernel of the bottleneck is told.
#pragma once

#include <type_traits>

#include "../bottleneck.h"
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

struct Problem {
  int rows = 0, middle = 1, inner = 1;  // M, and the sizes of the inner row dimensions
  int dim = 0, bottleneck = 0;          // D, r
  int chunks = 0, parts = 0;            // of D and of r
  Activations x;
  Matrix down, up;   // with norm, `down` is Wd diag(gamma); in backward `up` may be diag(s) Wu
  Vector down_bias;  // with norm, bd + Wd beta
  const float* down_sums = nullptr;  // [r] sums of the rows of `down`; LayerNorm iff present
  Vector up_bias, scale;
  bool channel_scale = false;
  float scale_value = 1, norm_eps = 0;
  Activation activation = Activation::identity;
  const int64_t* seed = nullptr;
  uint32_t threshold = 0;
  float keep = 1;
  float2* stats = nullptr;  // [M]
};

__device__ __forceinline__ int64_t row_offset(const Problem& p, const Activations& t, int row) {
  if (t.uniform) return row * t.strides[2];
  const int outer = row / p.inner, first = outer / p.middle;
  return first * t.strides[0] + (outer - first * p.middle) * t.strides[1] +
         (row - outer * p.inner) * t.strides[2];
}

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

}  // namespace fastadapters::cuda

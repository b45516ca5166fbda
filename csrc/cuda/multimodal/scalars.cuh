// Single numbers: elements in memory, activations, sums over a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../../tensors.h"

namespace fastadapters::cuda::head {

__device__ __forceinline__ float load(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::float32:
      return static_cast<const float*>(data)[i];
    case Dtype::bfloat16:
      return float(static_cast<const __nv_bfloat16*>(data)[i]);
    default:
      return float(static_cast<const __half*>(data)[i]);
  }
}

// A parameter of one element, or a number.
__device__ __forceinline__ float number(const Parameter& p, float value) {
  return p.data ? load(p.data, p.dtype, 0) : value;
}

__device__ __forceinline__ void store(const Parameter& to, int64_t i, float value) {
  switch (to.dtype) {
    case Dtype::float32:
      static_cast<float*>(to.data)[i] = value;
      return;
    case Dtype::bfloat16:
      static_cast<__nv_bfloat16*>(to.data)[i] = __float2bfloat16_rn(value);
      return;
    default:
      static_cast<__half*>(to.data)[i] = __float2half_rn(value);
  }
}

__device__ __forceinline__ float2 gelu(float z) {
  const float cdf = 0.5f + 0.5f * erff(0.707106781f * z);
  return {z * cdf, cdf + z * 0.398942280f * expf(-0.5f * z * z)};
}

// The value, and the derivative.
__device__ __forceinline__ float2 activate(Activation activation, float z) {
  if (activation == Activation::identity) return {z, 1};
  if (activation == Activation::relu) return {z < 0 ? 0 : z, z > 0 ? 1.0f : 0.0f};
  if (activation == Activation::gelu) return gelu(z);
  // z times a sigmoid of z (a + b z^2)
  const float a = activation == Activation::silu         ? 1.0f
                  : activation == Activation::quick_gelu ? 1.702f
                                                         : 1.59576912f;
  const float b = activation == Activation::gelu_tanh ? 0.0713548162f : 0.0f;
  const float gate = 1 / (1 + expf(-z * (a + b * z * z)));
  // Far out the gate is 0 or 1, and z^2 may be infinite.
  const float slope = z * gate * (1 - gate) * (a + 3 * b * z * z);
  return {z * gate, fabsf(z) < 128 ? gate + slope : gate};
}

// sigmoid(x) and sigmoid(-x), each to its last bits: 1 - sigmoid(x) has none left for large x.
__device__ __forceinline__ float2 sigmoids(float x) {
  const float small = expf(-fabsf(x)), large = 1 / (1 + small);
  return x < 0 ? float2{small * large, large} : float2{large, small * large};
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
  return value;
}

// Over a block of up to 8 warps, in a fixed order; all threads have the result. kUse: another
// number for each use in a kernel, so that none has to wait until the one before has been read.
template <int kUse, class T>
__device__ __forceinline__ T block_total(T value) {
  __shared__ T warps[8];
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (int i = 0; i < int(blockDim.x) / 32; ++i) value += warps[i];
  return value;
}

// A sum of products as if in twice the precision (Ogita, Rump and Oishi 2005, Dot2), by intrinsics
// that the compiler does not contract.
struct ExactSum {
  float sum = 0, rest = 0;

  __device__ __forceinline__ void add(float a, float b) {
    const float product = __fmul_rn(a, b), next = __fadd_rn(sum, product);
    const float added = __fsub_rn(next, sum);
    const float lost = __fadd_rn(__fsub_rn(sum, __fsub_rn(next, added)), __fsub_rn(product, added));
    rest = __fadd_rn(rest, __fadd_rn(lost, __fmaf_rn(a, b, -product)));
    sum = next;
  }
  __device__ __forceinline__ float value() const { return isinf(sum) ? sum : sum + rest; }
};

// acc += a b^T
__device__ __forceinline__ void outer(float (&acc)[4][4], float4 a, float4 b) {
  const float left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 16; ++i)
    acc[i / 4][i % 4] = fmaf(left[i / 4], right[i % 4], acc[i / 4][i % 4]);
}

}  // namespace fastadapters::cuda::head

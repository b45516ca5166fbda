// What the ops are told about tensors, on raw pointers, shared by the CPU and the CUDA backend.
#pragma once

#include <cstdint>

namespace fastadapters {

enum class Dtype : int32_t { float32, bfloat16, float16 };

enum class Activation : int32_t { identity, relu, gelu, gelu_tanh, silu, quick_gelu };

// [M, D] rows addressed by up to three row dimensions, whose sizes the op has; the last dimension
// has stride 1. Strides are in elements. A null `data` means "absent".
struct Rows {
  void* data = nullptr;
  int64_t strides[3] = {0, 0, 0};
};

// A contiguous parameter, or the gradient of one, in its own dtype. A null `data` means "absent".
struct Parameter {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
};

}  // namespace fastadapters

// What launchers share: the workspace, the device, a launch.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../tensors.h"
#include "tensors.cuh"

namespace fastadapters::cuda {

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Hands out the pieces of the workspace, or only counts their bytes.
struct Arena {
  char* base = nullptr;
  bool counting = true;
  int64_t used = 0;

  template <class T>
  T* take(int64_t bytes) {
    char* const piece = base + used;
    used += round_up(bytes, 256);
    return counting ? nullptr : reinterpret_cast<T*>(piece);
  }
};

struct Device {
  int processors = 1, shared_per_block = 0, shared_per_processor = 0, l2 = 0;  // bytes
};

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("fastadapters: CUDA: ") + cudaGetErrorString(error));
}

inline Device current_device() {
  int id = 0;
  check(cudaGetDevice(&id));
  const auto get = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, id));
    return value;
  };
  return {get(cudaDevAttrMultiProcessorCount), get(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          get(cudaDevAttrMaxSharedMemoryPerMultiprocessor), get(cudaDevAttrL2CacheSize)};
}

template <class P>
void launch(void (*kernel)(P), dim3 grid, int threads, int shared, cudaStream_t stream,
            const P& parameters) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  kernel<<<grid, threads, shared, stream>>>(parameters);
  check(cudaGetLastError());
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline bool on_16_bytes(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// `sizes`: of the row dimensions.
inline Activations activations(const int64_t (&sizes)[3], Dtype dtype, const Rows& rows) {
  Activations result;
  result.data = static_cast<char*>(rows.data);
  result.aligned = on_16_bytes(rows.data);
  // If all rows are `step` apart, the stride of the next dimension outwards is `reach`.
  int64_t step = 0, reach = -1;
  for (int i = 2; i >= 0; --i) {
    const int64_t stride = rows.strides[i] * size_of(dtype);
    result.strides[i] = stride;
    if (sizes[i] == 1) continue;
    if (reach < 0) step = reach = stride;
    if (stride != reach) result.uniform = false;
    if (stride % 16 != 0) result.aligned = false;
    reach *= sizes[i];
  }
  if (result.uniform) result.strides[2] = step;
  return result;
}

inline Vector vector(const Parameter& v) { return {v.data, v.dtype, false}; }

}  // namespace fastadapters::cuda

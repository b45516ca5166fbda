// The instructions that C++ has no word for: asynchronous copies, matrix loads, matrix products.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastadapters::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies `bytes` (0 to 16) from global to shared memory and zeroes the rest of the 16.
__device__ __forceinline__ void copy_async(void* target, const void* source, int bytes) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(target)),
      "l"(source), "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most `kPending` of this thread's groups are still under way.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit (or 8 x 4 of 32-bit) elements; lane i names row i % 8 of matrix i
// / 8.
template <bool kTranspose>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
  }
}

// c [16, 8] += a [16, 32 bytes] b [32 bytes, 8]
#define FASTADAPTERS_MMA(name, shape)                                                              \
  __device__ __forceinline__ void name(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) { \
    asm("mma.sync.aligned." shape                                                                  \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "                             \
        "%3};\n"                                                                                   \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                       \
  }
FASTADAPTERS_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FASTADAPTERS_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
FASTADAPTERS_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FASTADAPTERS_MMA

__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return bits;
}

// Stores 16 bytes that nobody reads soon: the first to leave the L2 cache.
__device__ __forceinline__ void store_streaming(void* target, uint4 value) {
  __stcs(static_cast<uint4*>(target), value);
}

}  // namespace fastadapters::cuda

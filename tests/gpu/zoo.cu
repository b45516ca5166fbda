// Small kernels, each with a planted bug (`bug` true) and a clean twin, and a matrix product to
// mutate. Every kernel has the signature (const float* x, float* y, int n); they run with 2 blocks
// of 64 threads unless said otherwise.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace {

__device__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

__device__ int global_index() { return blockIdx.x * blockDim.x + threadIdx.x; }

template <bool bug>
__global__ void global_bounds(const float* x, float* y, int n) {
  int i = global_index();
  if (bug || i < n) y[i] = x[i];
}

template <bool bug>
__global__ void global_alignment(const float* x, float* y, int) {
  if (global_index() < 8)
    reinterpret_cast<float4*>(y)[global_index()] =
        *reinterpret_cast<const float4*>(x + 4 * global_index() + bug);
}

template <bool bug>
__global__ void shared_bounds(const float* x, float* y, int n) {
  extern __shared__ float tile[];  // 64 floats
  tile[threadIdx.x + bug] = x[threadIdx.x];
  __syncthreads();
  if (global_index() < n) y[global_index()] = tile[threadIdx.x ^ 1];
}

template <bool bug>
__global__ void shared_alignment(const float* x, float* y, int n) {
  __shared__ __align__(16) float tile[68];
  tile[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x < 4) tile[64 + threadIdx.x] = 0;
  __syncthreads();
  float4 v = *reinterpret_cast<float4*>(&tile[threadIdx.x / 4 * 4 + bug]);
  if (global_index() < n) y[global_index()] = v.x + v.y + v.z + v.w;
}

template <bool bug>
__global__ void uninitialised(const float* x, float* y, int n) {
  __shared__ float tile[64];
  if (!bug || threadIdx.x != 5) tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (global_index() < n) y[global_index()] = tile[63 - threadIdx.x];
}

template <bool bug>
__global__ void missing_barrier(const float* x, float* y, int n) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  if (!bug) __syncthreads();
  if (global_index() < n) y[global_index()] = tile[63 - threadIdx.x];
}

template <bool bug>
__global__ void missing_barrier_before_reuse(const float* x, float* y, int n) {
  __shared__ float tile[64];
  float sum = 0;
#pragma unroll 1
  for (int k = 0; k < 4; ++k) {
    tile[threadIdx.x] = x[threadIdx.x] + k;
    __syncthreads();
    sum += tile[63 - threadIdx.x];
    if (!bug) __syncthreads();
  }
  if (global_index() < n) y[global_index()] = sum;
}

template <bool bug>
__global__ void missing_syncwarp(const float* x, float* y, int n) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  if (!bug) __syncwarp();
  if (global_index() < n) y[global_index()] = tile[threadIdx.x ^ 7];
}

template <bool bug>
__global__ void two_writers_in_shared(const float* x, float* y, int n) {
  __shared__ float tile[64];
  tile[bug ? threadIdx.x % 32 : threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (global_index() < n) y[global_index()] = tile[threadIdx.x % 32];
}

template <bool bug>
__global__ void missing_copy_wait(const float* x, float* y, int n) {
  __shared__ __align__(16) float tile[256];
  copy16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x % 64);
  commit();
  if (!bug) wait<0>();
  __syncthreads();
  if (global_index() < n) y[global_index()] = tile[threadIdx.x];
}

template <bool bug>
__global__ void missing_copy_commit(const float* x, float* y, int n) {
  __shared__ __align__(16) float tile[256];
  copy16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x % 64);
  if (!bug) commit();
  wait<0>();
  __syncthreads();
  if (global_index() < n) y[global_index()] = tile[threadIdx.x];
}

template <bool bug>
__global__ void missing_barrier_after_copy(const float* x, float* y, int n) {
  __shared__ __align__(16) float tile[256];
  copy16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x % 64);
  commit();
  wait<0>();
  if (!bug) __syncthreads();
  if (global_index() < n) y[global_index()] = tile[threadIdx.x ^ 9];
}

template <bool bug>
__global__ void two_blocks_on_one_word(const float* x, float* y, int n) {
  int i = bug ? threadIdx.x : global_index();
  if (i < n) y[i] = x[i];
}

// The block that arrives last adds up what the others wrote.
template <bool bug>
__global__ void missing_fence_between_blocks(const float* x, float* y, int n) {
  __shared__ bool last;
  auto* counter = reinterpret_cast<unsigned*>(y + n - 1);
  if (threadIdx.x == 0) {
    y[blockIdx.x] = x[blockIdx.x];
    if (!bug) __threadfence();
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
    if (!bug) __threadfence();
    if (last) y[2] = y[0] + y[1];
  }
}

template <bool bug>
__global__ void divergent_barrier(const float* x, float* y, int n) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  if (!bug || threadIdx.x % 32 < 16) __syncthreads();
  if (global_index() < n) y[global_index()] = tile[threadIdx.x];
}

template <bool bug>
__global__ void barrier_of_one_warp(const float* x, float* y, int n) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  if (!bug || threadIdx.x < 32) __syncthreads();
  if (global_index() < n) y[global_index()] = tile[threadIdx.x];
}

template <bool bug>
__global__ void barrier_after_exit(const float* x, float* y, int n) {
  __shared__ float tile[64];
  if (bug && threadIdx.x % 32 == 9) return;
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (global_index() < n) y[global_index()] = tile[threadIdx.x];
}

template <bool bug>
__global__ void named_barrier(const float* x, float* y, int n) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x < 32)
    asm volatile("bar.sync 1, %0;" ::"n"(bug ? 32 : 64) : "memory");
  else
    asm volatile("bar.arrive 1, 64;" ::: "memory");
  if (threadIdx.x < 32 && global_index() < n) y[global_index()] = tile[63 - threadIdx.x];
}

template <bool bug>
__global__ void divergent_shuffle(const float* x, float* y, int n) {
  float v = x[threadIdx.x];
  if (!bug || threadIdx.x % 32 < 16) v += __shfl_xor_sync(~0u, v, 1);
  if (global_index() < n) y[global_index()] = v;
}

template <bool bug>
__global__ void trapped(const float* x, float* y, int n) {
  if (bug && threadIdx.x == 40) __trap();
  if (global_index() < n) y[global_index()] = x[threadIdx.x];
}

template <bool bug>
__global__ void endless(const float* x, float* y, int n) {
  int i = 0;
  while (bug && reinterpret_cast<volatile const float*>(x)[i & 63] < 1e30f) ++i;
  if (global_index() < n) y[global_index()] = x[threadIdx.x] + i;
}

// A bulk copy of 256 bytes, awaited by an mbarrier. planted: 1 nobody waits, 2 too many bytes are
// expected, 3 the barrier is used by threads that do not know that it is initialised.
template <int planted>
__device__ void bulk_copy_body(const float* x, float* y, int n) {
  __shared__ __align__(128) float tile[64];
  __shared__ __align__(8) uint64_t barrier;
  uint32_t b = shared_address(&barrier);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(b) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (planted != 3) __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b),
                 "n"(planted == 2 ? 512 : 256)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 256, "
        "[%2];" ::"r"(shared_address(tile)),
        "l"(x), "r"(b)
        : "memory");
  }
  if (planted != 1) {
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0;\n@!p bra "
        "again;\n}" ::"r"(b)
        : "memory");
  }
  if (global_index() < n) y[global_index()] = tile[63 - threadIdx.x];
}
template <bool bug>
__global__ void bulk_copy_without_wait(const float* x, float* y, int n) {
#if __CUDA_ARCH__ >= 900
  bulk_copy_body<bug ? 1 : 0>(x, y, n);
#endif
}
template <bool bug>
__global__ void bulk_copy_expects_too_much(const float* x, float* y, int n) {
#if __CUDA_ARCH__ >= 900
  bulk_copy_body<bug ? 2 : 0>(x, y, n);
#endif
}
template <bool bug>
__global__ void mbarrier_not_published(const float* x, float* y, int n) {
#if __CUDA_ARCH__ >= 900
  bulk_copy_body<bug ? 3 : 0>(x, y, n);
#endif
}

// ---- c [m, 64] = a [m, k] b [64, k]^T in bf16: cp.async in two stages, ldmatrix, mma.sync. 4
// warps, 64 rows a block.

constexpr int kStep = 32;

template <bool swizzled>
__device__ int chunk(int row, int column) {  // of 16 bytes, in a tile of kStep columns
  int c = column / 8;
  return row * kStep + (swizzled ? (c ^ (row >> 1 & 3)) : c) * 8 + column % 8;
}

template <bool swizzled>
__global__ void __launch_bounds__(128)
    product(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int m, int k) {
  __shared__ __align__(128) __nv_bfloat16 tiles[2][2][64 * kStep];  // stage, operand
  const int first = blockIdx.x * 64, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto load = [&](int stage, int k0) {
    for (int i = threadIdx.x; i < 64 * kStep / 8; i += 128) {
      int row = i / (kStep / 8), column = i % (kStep / 8) * 8;
      int inside = first + row < m ? 16 : 0;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                       shared_address(&tiles[stage][0][chunk<swizzled>(row, column)])),
                   "l"(a + int64_t(inside ? first + row : 0) * k + k0 + column), "r"(inside)
                   : "memory");
      copy16(&tiles[stage][1][chunk<swizzled>(row, column)], b + int64_t(row) * k + k0 + column);
    }
    commit();
  };
  float sum[8][4] = {};
  load(0, 0);
#pragma unroll 1
  for (int step = 0; step < k / kStep; ++step) {
    if ((step + 1) * kStep < k) {
      load((step + 1) & 1, (step + 1) * kStep);
      wait<1>();
    } else {
      wait<0>();
    }
    __syncthreads();
    for (int kk = 0; kk < kStep; kk += 16) {
      uint32_t x[4];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                   : "r"(shared_address(&tiles[step & 1][0][chunk<swizzled>(warp * 16 + lane % 16,
                                                                            kk + lane / 16 * 8)])));
      for (int j = 0; j < 8; j += 2) {
        uint32_t y[4];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
                     : "r"(shared_address(&tiles[step & 1][1][chunk<swizzled>(
                         j * 8 + lane / 16 * 8 + lane % 8, kk + lane / 8 % 2 * 8)])));
        for (int h = 0; h < 2; ++h) {
          float* d = sum[j + h];
          asm volatile(
              "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, "
              "%7}, {%8, %9}, {%0, %1, %2, %3};"
              : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
              : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[2 * h]), "r"(y[2 * h + 1]));
        }
      }
    }
    __syncthreads();
  }
  for (int j = 0; j < 8; ++j) {
    for (int h = 0; h < 2; ++h) {
      int row = first + warp * 16 + lane / 4 + 8 * h;
      if (row < m)
        *reinterpret_cast<float2*>(c + int64_t(row) * 64 + 8 * j + lane % 4 * 2) =
            make_float2(sum[j][2 * h], sum[j][2 * h + 1]);
    }
  }
}

using Kernel = void (*)(const float*, float*, int);

}  // namespace

#define ZOO(name, threads, shared)                                          \
  extern "C" int name##_launch(const float* x, float* y, int n, bool bug) { \
    Kernel kernel = bug ? name<true> : name<false>;                         \
    kernel<<<2, threads, shared>>>(x, y, n);                                \
    return cudaGetLastError();                                              \
  }

ZOO(global_bounds, 64, 0)
ZOO(global_alignment, 64, 0)
ZOO(shared_bounds, 64, 256)
ZOO(shared_alignment, 64, 0)
ZOO(uninitialised, 64, 0)
ZOO(missing_barrier, 64, 0)
ZOO(missing_barrier_before_reuse, 64, 0)
ZOO(missing_syncwarp, 64, 0)
ZOO(two_writers_in_shared, 64, 0)
ZOO(missing_copy_wait, 64, 0)
ZOO(missing_copy_commit, 64, 0)
ZOO(missing_barrier_after_copy, 64, 0)
ZOO(two_blocks_on_one_word, 64, 0)
ZOO(missing_fence_between_blocks, 64, 0)
ZOO(divergent_barrier, 64, 0)
ZOO(barrier_of_one_warp, 64, 0)
ZOO(barrier_after_exit, 64, 0)
ZOO(named_barrier, 64, 0)
ZOO(divergent_shuffle, 64, 0)
ZOO(trapped, 64, 0)
ZOO(endless, 64, 0)
ZOO(bulk_copy_without_wait, 64, 0)
ZOO(bulk_copy_expects_too_much, 64, 0)
ZOO(mbarrier_not_published, 64, 0)

extern "C" int product_launch(const void* a, const void* b, float* c, int m, int k, bool swizzled) {
  auto kernel = swizzled ? product<true> : product<false>;
  kernel<<<(m + 63) / 64, 128>>>(static_cast<const __nv_bfloat16*>(a),
                                 static_cast<const __nv_bfloat16*>(b), c, m, k);
  return cudaGetLastError();
}

// With `bytes` of dynamic shared memory, after asking for `limit`.
extern "C" int large_launch(const float* x, float* y, int n, int bytes, int limit) {
  cudaError_t error = cudaFuncSetAttribute(shared_bounds<false>,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  if (error != cudaSuccess) return cudaGetLastError();
  shared_bounds<false><<<1, 64, bytes>>>(x, y, n);
  return cudaGetLastError();
}

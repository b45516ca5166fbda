// Tiles in shared memory: loading and storing them.
//
// A panel is a few rows of 128 bytes, one line of global memory each. Its 16-byte segments are
// permuted within each row so that every access below, by rows, by columns or by fragments of a
// matrix product, meets each bank once. A block has four warps in a 2 x 2 grid over its tile.
#pragma once

#include "ptx.cuh"

namespace fastadapters::cuda {

constexpr int kThreads = 128;
constexpr int kRows = 64;              // rows of activations in a tile
constexpr int kLine = 128;             // bytes in a row of a panel
constexpr int kPanel = kRows * kLine;  // bytes in a panel of activations
constexpr int kSegments = kLine / 16;

__device__ __forceinline__ int permute(int row) { return ((row << 1) & 6) | ((row >> 2) & 1); }

__device__ __forceinline__ int segment_offset(int row, int segment) {
  return row * kLine + ((segment ^ permute(row)) << 4);
}

// Where byte `byte` of row `row` lies in panels of `stride` bytes side by side.
__device__ __forceinline__ int byte_offset(int stride, int row, int byte) {
  return byte / kLine * stride + segment_offset(row, byte % kLine >> 4) + (byte & 15);
}

// How a dtype is multiplied. All share one layout of the accumulators, that of mma.m16n8: lane 4 g
// + t has columns 2 t and 2 t + 1 of rows g and g + 8, in this order.
struct BFloat16 {
  using T = __nv_bfloat16;
  static constexpr bool kTensorCore = true;
  static __device__ __forceinline__ uint32_t pack(float a, float b) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<uint32_t&>(pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t bits) {
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000)};
  }
  static __device__ __forceinline__ float round(float v) {
    return __bfloat162float(__float2bfloat16_rn(v));
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t* b) {
    mma_bf16(c, a, b);
  }
};

struct Float16 {
  using T = __half;
  static constexpr bool kTensorCore = true;
  static __device__ __forceinline__ uint32_t pack(float a, float b) {
    __half2 pair = __floats2half2_rn(a, b);
    return reinterpret_cast<uint32_t&>(pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t bits) {
    return __half22float2(reinterpret_cast<__half2&>(bits));
  }
  static __device__ __forceinline__ float round(float v) {
    return __half2float(__float2half_rn(v));
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t* b) {
    mma_f16(c, a, b);
  }
};

template <bool kTf32>
struct Float32 {
  using T = float;
  static constexpr bool kTensorCore = kTf32;
  static __device__ __forceinline__ float round(float v) { return v; }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t* b) {
    mma_tf32(c, a, b);
  }
};

// fp32 as stored, however it is multiplied.
using Full = Float32<false>;

// Panels side by side that hold as many columns of S as one panel holds of E.
template <class E, class S>
constexpr int kPanels = int(sizeof(typename S::T) / sizeof(typename E::T));

// Two neighbouring elements, as fp32.
template <class E>
__device__ __forceinline__ float2 load_pair(const void* from) {
  if constexpr (sizeof(typename E::T) == 4) {
    return *static_cast<const float2*>(from);
  } else {
    return E::unpack(*static_cast<const uint32_t*>(from));
  }
}

template <class E>
__device__ __forceinline__ void store_pair(void* to, float a, float b) {
  if constexpr (sizeof(typename E::T) == 4) {
    *static_cast<uint64_t*>(to) = uint64_t(__float_as_uint(b)) << 32 | __float_as_uint(a);
  } else {
    *static_cast<uint32_t*>(to) = E::pack(a, b);
  }
}

// The 16 bytes of a segment, as fp32.
template <class E, int kN>
__device__ __forceinline__ void load_segment(const void* from, float (&to)[kN]) {
  const uint4 bits = *static_cast<const uint4*>(from);
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kN == 4) {
      to[i] = __uint_as_float(words[i]);
    } else {
      const float2 v = E::unpack(words[i]);
      to[2 * i] = v.x, to[2 * i + 1] = v.y;
    }
  }
}

template <class E, int kN>
__device__ __forceinline__ void store_segment(void* to, const float (&from)[kN]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kN == 4) {
      words[i] = __float_as_uint(from[i]);
    } else {
      words[i] = E::pack(from[2 * i], from[2 * i + 1]);
    }
  }
  *static_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
}

// Where a lane's two neighbouring columns of accumulator [i / 2][n][i % 2 * 2] lie in panels of the
// result, for a warp whose tile starts at `row` and `column`.
template <class E>
struct Fragment {
  static constexpr int kSize = sizeof(typename E::T);
  int base, segment;

  __device__ __forceinline__ Fragment(int row, int column, int stride) {
    const int group = threadIdx.x % 32 / 4,
              byte = column * kSize % kLine + threadIdx.x % 4 * 2 * kSize;
    base = column * kSize / kLine * stride + (row + group) * kLine + byte % 16;
    segment = (byte / 16 ^ permute(group)) << 4;
  }
  __device__ __forceinline__ int operator()(int i, int n) const {
    return base + 8 * i * kLine + ((8 * n * kSize) ^ segment);
  }
};

// Brings kCount rows of kBytes to a panel. row(i) is where row i starts, whether or not it may be
// read: from row `rows` on, and beyond `bytes` of a row, there are zeros. Whoever waits for this
// thread's copies, and then for the block, sees them. If rows do not start on 16 bytes (`aligned`),
// elements are loaded one by one.
template <class T, int kCount, int kBytes = kLine, class Row>
__device__ __forceinline__ void load_panel(char* panel, int rows, int bytes, bool aligned,
                                           Row row) {
  constexpr int kPerRow = kBytes / 16, kStep = kThreads / kPerRow;
  const int segment = threadIdx.x % kPerRow;
  const int valid = min(max(bytes - 16 * segment, 0), 16);
  int first = threadIdx.x / kPerRow;
  // Rows 0 and 2 share no bank in half a line, 0 and 1 do.
  if constexpr (kPerRow == 4) first = (first & ~3) | (first & 1) << 1 | (first >> 1 & 1);
  char* const target = panel + segment_offset(first, segment);
  if (aligned) {
#pragma unroll
    for (int i = 0; i < kCount; i += kStep) {
      copy_async(target + i * kLine, row(first + i) + 16 * segment, first + i < rows ? valid : 0);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kCount; i += kStep) {
      alignas(16) T elements[16 / sizeof(T)];
      const T* const source = reinterpret_cast<const T*>(row(first + i) + 16 * segment);
      const int size = first + i < rows ? valid : 0;
#pragma unroll
      for (int e = 0; e < int(16 / sizeof(T)); ++e) {
        elements[e] = e * int(sizeof(T)) < size ? source[e] : T(0.0f);
      }
      *reinterpret_cast<uint4*>(target + i * kLine) = *reinterpret_cast<uint4*>(elements);
    }
  }
}

// The reverse, of kRows rows, in whole lines where they are whole.
template <class T, class Row>
__device__ __forceinline__ void store_panel(const char* panel, int rows, int bytes, bool aligned,
                                            Row row) {
  constexpr int kStep = kThreads / kSegments;
  const int segment = threadIdx.x % kSegments, first = threadIdx.x / kSegments;
  const int valid = min(bytes - 16 * segment, 16);
  const char* const source = panel + segment_offset(first, segment);
  if (aligned && valid == 16) {
#pragma unroll
    for (int i = 0; i < kRows; i += kStep) {
      if (first + i < rows) {
        store_streaming(row(first + i) + 16 * segment,
                        *reinterpret_cast<const uint4*>(source + i * kLine));
      }
    }
  } else {
#pragma unroll 1
    for (int i = 0; first + i < rows && i < kRows; i += kStep) {
      alignas(16) T elements[16 / sizeof(T)];
      *reinterpret_cast<uint4*>(elements) = *reinterpret_cast<const uint4*>(source + i * kLine);
      T* const target = reinterpret_cast<T*>(row(first + i) + 16 * segment);
#pragma unroll
      for (int e = 0; e < int(16 / sizeof(T)); ++e) {
        if (e * int(sizeof(T)) < valid) target[e] = elements[e];
      }
    }
  }
}

// A chunk of rows stored as S: as many columns as a panel holds of E, with zeros beyond `dim`. Its
// panels lie side by side; the rest as in load_panel and store_panel.
template <class E, class S, class Row>
__device__ __forceinline__ void load_chunk(char* panels, int rows, int chunk, int dim, bool aligned,
                                           Row row) {
#pragma unroll
  for (int i = 0; i < kPanels<E, S>; ++i) {
    const int begin = (chunk * kPanels<E, S> + i) * kLine;
    load_panel<typename S::T, kRows>(panels + i * kPanel, rows,
                                     dim * int(sizeof(typename S::T)) - begin, aligned,
                                     [&](int j) { return row(j) + begin; });
  }
}

template <class E, class S, class Row>
__device__ __forceinline__ void store_chunk(const char* panels, int rows, int chunk, int dim,
                                            bool aligned, Row row) {
#pragma unroll
  for (int i = 0; i < kPanels<E, S>; ++i) {
    const int begin = (chunk * kPanels<E, S> + i) * kLine;
    store_panel<typename S::T>(panels + i * kPanel, rows, dim * int(sizeof(typename S::T)) - begin,
                               aligned, [&](int j) { return row(j) + begin; });
  }
}

}  // namespace fastadapters::cuda

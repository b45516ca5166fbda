// Tiles in shared memory: loading, multiplying and storing them.
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

// The reverse, in whole lines where they are whole.
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

// One operand of a product: panels `stride` bytes apart. If kTransposed, a row of the panels is one
// value of the summed index; else a row is one row of the result (or one column, for the right
// operand). `origin`: the warp's first row or column of the result.
struct Operand {
  const char* panels;
  int stride;
  int origin;
};

// acc += a b over kSteps times 32 bytes of the summed index where rows hold it, the same number of
// elements where columns do. `shift` is subtracted from the rows of an untransposed fp32 `a`.
//
// An origin is a multiple of the warp's extent, so a segment's number is a sum without carries of a
// part that depends on the lane, permuted once, and a constant: `^` adds them.
template <class E, int kSteps, bool kTransposedA, bool kTransposedB, int kM, int kN>
__device__ __forceinline__ void multiply(float (&acc)[kM][kN][4], Operand a, Operand b,
                                         const float (&shift)[kM][2]) {
  constexpr int kSize = sizeof(typename E::T);
  constexpr int kDepth = 32 / kSize;  // elements of the summed index in a step
  const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
  if constexpr (E::kTensorCore) {
    const int row = lane % 8, first = lane / 8 % 2, second = lane / 16;
    const char *left_row, *right_row;
    int left_segment, right_segment;
    // Transposed fp32 goes element by element, its rows pair and pair + 4.
    const auto element_row = [&](Operand o, int* segment) {
      const int column = o.origin % (kLine / 4) + group;
      *segment = (column / 4 ^ permute(pair)) << 4;
      return o.panels + o.origin / (kLine / 4) * o.stride + pair * kLine + column % 4 * 4;
    };
    if constexpr (!kTransposedA) {
      left_row = a.panels + (a.origin + 8 * first + row) * kLine;
      left_segment = (second ^ permute(row)) << 4;
    } else if constexpr (kSize == 2) {
      left_row = a.panels + (8 * second + row) * kLine;
      left_segment = ((a.origin / 8 + first) ^ permute(row)) << 4;
    } else {
      left_row = element_row(a, &left_segment);
    }
    if constexpr (!kTransposedB) {
      right_row = b.panels + (b.origin + 8 * second + row) * kLine;
      right_segment = (first ^ permute(row)) << 4;
    } else if constexpr (kSize == 2) {
      right_row = b.panels + (8 * first + row) * kLine;
      right_segment = ((b.origin / 8 + second) ^ permute(row)) << 4;
    } else {
      right_row = element_row(b, &right_segment);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int along_row = 32 * step % kLine;  // of a summed index that rows hold
      uint32_t left[kM][4], right[kN][2];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        if constexpr (!kTransposedA) {
          load_matrices<false>(left[m], left_row + 32 * step / kLine * a.stride + 16 * m * kLine +
                                            (along_row ^ left_segment));
          if constexpr (kSize == 4) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              left[m][i] = to_tf32(__uint_as_float(left[m][i]) - shift[m][i % 2]);
            }
          }
        } else if constexpr (kSize == 2) {
          load_matrices<true>(left[m],
                              left_row + kDepth * step * kLine + ((2 * m * 16) ^ left_segment));
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int constant = (4 * m + i % 2 * 2) * 16 ^ permute(i / 2 * 4) * 16;
            left[m][i] = to_tf32(*reinterpret_cast<const float*>(
                left_row + (kDepth * step + i / 2 * 4) * kLine + (constant ^ left_segment)));
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t four[4];
        if constexpr (!kTransposedB) {
          load_matrices<false>(four, right_row + 32 * step / kLine * b.stride + 8 * n * kLine +
                                         (along_row ^ right_segment));
        } else if constexpr (kSize == 2) {
          load_matrices<true>(four, right_row + kDepth * step * kLine + ((n * 16) ^ right_segment));
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int constant = (2 * n + i / 2 * 2) * 16 ^ permute(i % 2 * 4) * 16;
            four[i] = *reinterpret_cast<const uint32_t*>(
                right_row + (kDepth * step + i % 2 * 4) * kLine + (constant ^ right_segment));
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          right[n + i / 2][i % 2] = kSize == 4 ? to_tf32(__uint_as_float(four[i])) : four[i];
        }
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) E::mma(acc[m][n], left[m], right[n]);
      }
    }
  } else {
    // Four values of the summed index at a time, in the accumulators of the matrix instruction.
    // Sums of their own for each call make the chains of additions shorter, and so the errors
    // smaller.
    float sums[kM][kN][4] = {};
    const auto at = [](Operand o, int row, int column) {
      return o.panels + byte_offset(o.stride, row, 4 * column);
    };
#pragma unroll 2
    for (int k = 0; k < kSteps * kDepth; k += 4) {
      float left[kM][2][4], right[kN][2][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int index = a.origin + 16 * m + 8 * half + group;
          if constexpr (!kTransposedA) {
            load_segment<E>(at(a, index, k), left[m][half]);
#pragma unroll
            for (int e = 0; e < 4; ++e) left[m][half][e] -= shift[m][half];
          } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              left[m][half][e] = *reinterpret_cast<const float*>(at(a, k + e, index));
            }
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int index = b.origin + 8 * n + 2 * pair;
        if constexpr (!kTransposedB) {
          load_segment<E>(at(b, index, k), right[n][0]);
          load_segment<E>(at(b, index + 1, k), right[n][1]);
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float2 v = load_pair<E>(at(b, k + e, index));
            right[n][0][e] = v.x, right[n][1][e] = v.y;
          }
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              sums[m][n][i] = fmaf(left[m][i / 2][e], right[n][i % 2][e], sums[m][n][i]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kM * kN * 4; ++i) (&acc[0][0][0])[i] += (&sums[0][0][0])[i];
  }
}

}  // namespace fastadapters::cuda

// What every kernel of the sequence fusion is told, and how it reads parameters and single
// elements.
#pragma once

#include "../../sequence_fusion.h"
#include "../tensors.cuh"

namespace fastadapters::cuda::fusion {

constexpr int kSlab = 64;  // columns of x that a block of the backward keeps to
constexpr int kTile = 32;  // rows (b, o) and columns of a tile of y
constexpr int kPart = 16;  // columns of r, and pairs (q, o), that are multiplied at a time

struct Input {
  Activations x, dx;  // strides[1], strides[2] are those of B, T
  int tokens = 0, dim = 0, width = 0, factor_tokens = 0;
  int padded = 0;       // r in whole parts of those that dz is multiplied in
  int tiles = 0;        // of kRows tokens of an item
  bool wide_x = false;  // x is fp32, whatever the products are
  const int64_t* lengths = nullptr;
  Parameter down_weight, down_bias, time_factor, feature_factor;
  float* products = nullptr;  // [B, R, T_o, r]
  char* z = nullptr;          // [B, T, r]
  float* partials = nullptr;  // forward: P of each tile of tokens, [tiles, B, R, T_o, r]

  // Backward: partial sums, the numbers of which are in Problem, and dz [B T, padded r]. What
  // nobody asks for is absent.
  float* d_products = nullptr;        // [column_groups, B, R, T_o, r]
  float* d_feature_factor = nullptr;  // [row_groups, R, r, D]
  float* d_time_factor = nullptr;     // [item_groups, R T_o, tiles * kRows]
  float* d_down_bias = nullptr;       // [item_groups, tiles, padded r]
  float* d_down_weight = nullptr;     // [splits, slabs * kSlab, padded r]
  char* dz = nullptr;
  int slabs = 0, splits = 0, tiles_per_split = 0;
};

struct Problem {
  int modalities = 0, items = 0, out_len = 0, dim = 0, rank = 0;  // M, B, T_o, D, R
  int time_copies = 1, feature_copies = 1;                        // ranks to be summed first
  Activation activation = Activation::identity;
  bool add_leading = false;
  bool wide_out = false;      // residual, y and dy are fp32, whatever the products are
  Activations residual, out;  // forward: y; backward: dy
  int tiles = 0;              // of an item's tokens, of all modalities
  // Backward: tiles of y and items that have one partial sum.
  int row_tiles_per_group = 1, column_tiles_per_group = 1, items_per_group = 1;
  Input input[kMaxModalities];

  __host__ __device__ int factors() const { return rank * out_len; }
};

// Tokens of an item that count.
__device__ __forceinline__ int counted(const Input& in, int item) {
  if (!in.lengths) return in.tokens;
  const int64_t length = in.lengths[item];
  return length < 0 ? 0 : length < in.tokens ? int(length) : in.tokens;
}

// Row i of the residual made of an item's leading tokens, or null.
__device__ __forceinline__ const char* leading_row(const Problem& p, int item, int i) {
  for (int m = 0; m < p.modalities; ++m) {
    const Input& in = p.input[m];
    const int count = counted(in, item);
    if (i < count) return in.x.data + item * in.x.strides[1] + i * in.x.strides[2];
    i -= count;
  }
  return nullptr;
}

// Which row of y a modality's first token is added to.
__device__ __forceinline__ int leading_offset(const Problem& p, int m, int item) {
  int offset = 0;
  for (int i = 0; i < m; ++i) offset += counted(p.input[i], item);
  return offset;
}

template <class T, int kN>
struct alignas(kN * sizeof(T) < 16 ? kN * sizeof(T) : 16) Elements {
  T at[kN];
};

// The bits of a 16-bit element as fp32.
__device__ __forceinline__ float widen(uint16_t bits, Dtype dtype) {
  return dtype == Dtype::bfloat16 ? __uint_as_float(uint32_t(bits) << 16)
                                  : __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ float load_one(const Parameter& v, int64_t at) {
  if (v.dtype == Dtype::float32) return static_cast<const float*>(v.data)[at];
  return widen(static_cast<const uint16_t*>(v.data)[at], v.dtype);
}

// to += convert(each of the first `valid` of kN elements), in one load where they are aligned.
template <class T, int kN, class Convert>
__device__ __forceinline__ void add_elements(float (&to)[kN], const T* from, int valid,
                                             Convert convert) {
  using Vector = Elements<T, kN>;
  if (valid >= kN && reinterpret_cast<uintptr_t>(from) % alignof(Vector) == 0) {
    const Vector all = *reinterpret_cast<const Vector*>(from);
#pragma unroll
    for (int i = 0; i < kN; ++i) to[i] += convert(all.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if (i < valid) to[i] += convert(from[i]);
    }
  }
}

template <int kN>
__device__ __forceinline__ void add_floats(float (&to)[kN], const float* from, int valid) {
  add_elements(to, from, valid, [](float v) { return v; });
}

template <int kN>
__device__ __forceinline__ void add_parameter(float (&to)[kN], const Parameter& v, int64_t at,
                                              int valid) {
  if (v.dtype == Dtype::float32)
    return add_floats(to, static_cast<const float*>(v.data) + at, valid);
  add_elements(to, static_cast<const uint16_t*>(v.data) + at, valid,
               [&](uint16_t bits) { return widen(bits, v.dtype); });
}

// Fills `rows` rows of kBytes in panels `stride` bytes apart. fill(row, column, values) sets the
// elements of one segment, zeros until then; they are rounded to E.
template <class E, int kBytes, class Fill>
__device__ __forceinline__ void fill_panels(char* panels, int stride, int rows, Fill fill) {
  constexpr int kPerRow = kBytes / 16, kN = 16 / sizeof(typename E::T);
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * kPerRow; i += kThreads) {
    int row = i / kPerRow;
    // Rows 0 and 2 share no bank in half a line, 0 and 1 do.
    if constexpr (kPerRow == 4) row = (row & ~3) | (row & 1) << 1 | (row >> 1 & 1);
    const int segment = i % kPerRow;
    float values[kN] = {};
    fill(row, segment * kN, values);
    store_segment<E>(
        panels + segment / kSegments * stride + segment_offset(row, segment % kSegments), values);
  }
}

// Rows [first, ..) and columns [column, ..) of a parameter [copies, rows, columns], summed over its
// copies; zeros beyond.
template <class E, int kBytes>
__device__ __forceinline__ void fill_parameter(char* panels, int stride, int count,
                                               const Parameter& v, int64_t rows, int64_t columns,
                                               int copies, int64_t apart, int64_t first,
                                               int64_t column) {
  fill_panels<E, kBytes>(panels, stride, count, [&](int i, int j, auto& values) {
    if (first + i >= rows) return;
    const int valid = int(columns - column) - j;
    const int64_t at = (first + i) * columns + column + j;
#pragma unroll 1
    for (int copy = 0; copy < copies; ++copy) add_parameter(values, v, at + copy * apart, valid);
  });
}

// A [time_copies or R, T, T_o] transposed: rows (q, o) from `first` on, a column for each of kRows
// tokens from `token` on, `tokens` of which there are.
template <class E>
__device__ __forceinline__ void fill_time_factor(char* panels, int stride, int count,
                                                 const Problem& p, const Input& in, int first,
                                                 int token, int tokens) {
  const int64_t matrix = int64_t(in.factor_tokens) * p.out_len;
  fill_panels<E, kRows * sizeof(typename E::T)>(
      panels, stride, count, [&](int i, int j, auto& values) {
        if (first + i >= p.factors()) return;
        const int q = (first + i) / p.out_len, o = (first + i) % p.out_len;
        constexpr int kN = sizeof(values) / 4;
#pragma unroll 1
        for (int copy = 0; copy < p.time_copies; ++copy) {
          const int64_t at = (q + copy) * matrix + int64_t(token + j) * p.out_len + o;
#pragma unroll
          for (int e = 0; e < kN; ++e) {
            if (j + e < tokens) values[e] += load_one(in.time_factor, at + e * p.out_len);
          }
        }
      });
}

// Two neighbouring elements of a row, `valid` of which there are, stored as E or in fp32.
template <class E>
__device__ __forceinline__ float2 load_two(const char* row, int column, int valid, bool wide) {
  float2 v = {0, 0};
  const auto get = [&](auto element) {
    using T = decltype(element);
    const T* const from = reinterpret_cast<const T*>(row) + column;
    if (valid >= 2 && reinterpret_cast<uintptr_t>(from) % (2 * sizeof(T)) == 0) {
      const auto pair = *reinterpret_cast<const Elements<T, 2>*>(from);
      v = {float(pair.at[0]), float(pair.at[1])};
    } else {
      if (valid > 0) v.x = float(from[0]);
      if (valid > 1) v.y = float(from[1]);
    }
  };
  if (wide) {
    get(float{});
  } else {
    get(typename E::T{});
  }
  return v;
}

template <class E>
__device__ __forceinline__ void store_two(char* row, int column, int valid, bool wide, float a,
                                          float b) {
  const auto put = [&](auto element) {
    using T = decltype(element);
    T* const to = reinterpret_cast<T*>(row) + column;
    if (valid >= 2 && reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0) {
      *reinterpret_cast<Elements<T, 2>*>(to) = {T(a), T(b)};
    } else {
      if (valid > 0) to[0] = T(a);
      if (valid > 1) to[1] = T(b);
    }
  };
  if (wide) {
    put(float{});
  } else {
    put(typename E::T{});
  }
}

// Accumulators of a partial sum that this thread alone goes on with.
__device__ __forceinline__ float2 load_two(const float* from, int valid, bool first) {
  if (first) return {0, 0};
  return load_two<Full>(reinterpret_cast<const char*>(from), 0, valid, true);
}
__device__ __forceinline__ void store_two(float* to, int valid, float a, float b) {
  store_two<Full>(reinterpret_cast<char*>(to), 0, valid, true, a, b);
}

}  // namespace fastadapters::cuda::fusion

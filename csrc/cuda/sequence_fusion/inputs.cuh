// From dz to dx and dWd: backward's last part that sees x, which it reads once for both.
#pragma once

#include "hidden.cuh"

namespace fastadapters::cuda::fusion {

// A stage has kRows rows (b, t) of kSlab columns of x, and of a part of dz, and the slab's part of
// Wd; where r is one part, the first stage's is that of all.
template <class E, int kWidth, class X>
struct Inputs {
  static constexpr int kSize = sizeof(typename E::T);
  static constexpr int kPanelsOfX = kSlab * int(sizeof(typename X::T)) / kLine;
  static constexpr int kDz = kPanelsOfX * kPanel;  // where dz begins
  static constexpr int kWeights = kDz + Hidden<E, kWidth>::kBytes;
  static constexpr int kWeightPanels = kSlab * kSize / kLine;
  static constexpr int kBytes = kWeights + kWeightPanels * kWidth * kLine;
};

struct InputPass : Problem {
  int stages = 2;
  bool read_x[kMaxModalities] = {};  // not where only dx is asked for
};

// Brings kRows rows of kBytes to a panel; row(i) is null where it does not count: zeros.
template <class T, int kBytes, class Row>
__device__ __forceinline__ void load_rows(char* panel, int bytes, bool aligned, Row row) {
  constexpr int kPerRow = kBytes / 16, kStep = kThreads / kPerRow;
  const int segment = threadIdx.x % kPerRow;
  const int valid = min(max(bytes - 16 * segment, 0), 16);
  int first = threadIdx.x / kPerRow;
  // Rows 0 and 2 share no bank in half a line, 0 and 1 do.
  if constexpr (kPerRow == 4) first = (first & ~3) | (first & 1) << 1 | (first >> 1 & 1);
#pragma unroll 1
  for (int i = first; i < kRows; i += kStep) {
    char* const target = panel + segment_offset(i, segment);
    const char* const from = row(i);
    if (aligned) {
      copy_async(target, from ? from + 16 * segment : panel, from ? valid : 0);
      continue;
    }
    alignas(16) T elements[16 / sizeof(T)];
    const T* const source = reinterpret_cast<const T*>(from + 16 * segment);
#pragma unroll
    for (int e = 0; e < int(16 / sizeof(T)); ++e) {
      elements[e] = from && e * int(sizeof(T)) < valid ? source[e] : T(0.0f);
    }
    *reinterpret_cast<uint4*>(target) = *reinterpret_cast<uint4*>(elements);
  }
}

template <class E, int kWidth, class X>
__device__ __forceinline__ void input_slab(const InputPass& p, char* shared, int m, int slab,
                                           int split) {
  using L = Inputs<E, kWidth, X>;
  using T = typename X::T;
  constexpr int kSize = L::kSize, kN = kWidth / 8;
  const Input& in = p.input[m];
  const int column = slab * kSlab;
  const int padded = in.padded, parts = padded / kWidth;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, pair = lane % 4;
  const int total = p.items * in.tokens;
  const int first_row = split * in.tiles_per_split * kRows;
  const int last_row = min(first_row + in.tiles_per_split * kRows, total);
  const int steps = (last_row - first_row + kRows - 1) / kRows * parts;
  const float no_shift[1][2] = {};
  const auto row_of = [&](const Activations& t, int row) {
    return t.data + row / in.tokens * t.strides[1] + row % in.tokens * t.strides[2] +
           column * int(sizeof(T));
  };

  // x is in the stage of its tile, what depends on the part in that of the step.
  const auto stage_of = [&](int step) { return shared + step % p.stages * L::kBytes; };
  const auto load_weights = [&](int step) {
    for (int i = 0; i < L::kWeightPanels; ++i) {
      fill_parameter<E, kLine>(stage_of(step) + L::kWeights + i * kWidth * kLine, 0, kWidth,
                               in.down_weight, in.width, in.dim, 1, 0, step % parts * kWidth,
                               column + i * kLine / kSize);
    }
  };
  const auto load_next = [&](int step) {
    if (step < steps) {
      const int tile = step / parts, part = step % parts, row = first_row + tile * kRows;
      if (p.read_x[m] && part == 0) {
#pragma unroll
        for (int i = 0; i < L::kPanelsOfX; ++i) {
          load_rows<T, kLine>(stage_of(tile) + i * kPanel,
                              (in.dim - column) * int(sizeof(T)) - i * kLine, in.x.aligned,
                              [&](int j) -> const char* {
                                if (row + j >= last_row) return nullptr;
                                const int item = (row + j) / in.tokens;
                                if (in.lengths && row + j - item * in.tokens >= counted(in, item))
                                  return nullptr;
                                return row_of(in.x, row + j) + i * kLine;
                              });
        }
      }
#pragma unroll
      for (int i = 0; i < Hidden<E, kWidth>::kPanelCount; ++i) {
        load_rows<typename E::T, Hidden<E, kWidth>::kUsed>(
            stage_of(step) + L::kDz + i * kPanel, kLine, true, [&](int j) -> const char* {
              if (row + j >= last_row) return nullptr;
              return in.dz + (int64_t(row + j) * padded + part * kWidth) * kSize + i * kLine;
            });
      }
      if (in.dx.data && (parts > 1 || step == 0)) load_weights(step);
    }
    copy_commit();
  };

#pragma unroll 1
  for (int i = 0; i < p.stages - 1; ++i) load_next(i);
  float d_weight[1][kN][4] = {}, dx[1][kSlab / 8][4] = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (p.stages == 2) {
      copy_wait<0>();
    } else {
      copy_wait<1>();
    }
    __syncthreads();
    load_next(step + p.stages - 1);
    const int part = step % parts;
    char* const x = stage_of(step / parts);
    const char* const dz = stage_of(step) + L::kDz;
    if (in.d_down_weight) {  // x^T dz
      const auto each = [&](auto visit) {
#pragma unroll
        for (int i = 0; i < 2 * kN; ++i) {
          const int64_t row =
              int64_t(split) * in.slabs * kSlab + column + 16 * warp + i % 2 * 8 + group;
          float* const value = d_weight[0][i / 2] + i % 2 * 2;
          visit(in.d_down_weight + row * padded + part * kWidth + i / 2 * 8 + 2 * pair, value);
        }
      };
      // There are registers for one part; of several each goes on where it was.
      if (parts > 1) {
        each([&](float* from, float* value) {
          const float2 v = load_two(from, 2, step < parts);
          value[0] = v.x, value[1] = v.y;
        });
      }
      multiply<E, kRows * kSize / 32, true, true, X>(d_weight, {x, kPanel, 16 * warp},
                                                     {dz, kPanel, 0}, no_shift);
      if (parts > 1 || step == steps - 1) {
        each([&](float* to, float* value) { store_two(to, 2, value[0], value[1]); });
      }
    }
    if (!in.dx.data) continue;

    // dz Wd
    multiply<E, kWidth * kSize / 32, false, true>(
        dx, {dz, kPanel, 16 * warp},
        {stage_of(parts > 1 ? step : 0) + L::kWeights, kWidth * kLine, 0}, no_shift);
    if (part < parts - 1) continue;
    const int row = first_row + step / parts * kRows;
    if (p.add_leading) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = row + 16 * warp + 8 * half + group;
        if (at >= last_row) continue;
        const int item = at / in.tokens, token = at % in.tokens;
        if (token >= p.out_len || token >= counted(in, item)) continue;
        const int o = token + leading_offset(p, m, item);
        if (o >= p.out_len) continue;
        const char* const from = p.out.data + item * p.out.strides[1] + o * p.out.strides[2];
#pragma unroll
        for (int n = 0; n < kSlab / 8; ++n) {
          const int to = column + 8 * n + 2 * pair;
          const float2 v = load_two<E>(from, to, p.dim - to, p.wide_out);
          dx[0][n][2 * half] += v.x, dx[0][n][2 * half + 1] += v.y;
        }
      }
    }
    __syncthreads();  // x has been read
    const Fragment<X> place(16 * warp, 0, kPanel);
#pragma unroll
    for (int i = 0; i < 2 * kSlab / 8; ++i) {
      constexpr int kPerPanel = kLine / (8 * int(sizeof(T)));
      float* const value = dx[0][i / 2] + i % 2 * 2;
      store_pair<X>(x + i / 2 / kPerPanel * kPanel + place(i % 2, i / 2 % kPerPanel), value[0],
                    value[1]);
      value[0] = value[1] = 0;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < L::kPanelsOfX; ++i) {
      store_panel<T>(x + i * kPanel, last_row - row, (in.dim - column) * int(sizeof(T)) - i * kLine,
                     in.dx.aligned, [&](int j) { return row_of(in.dx, row + j) + i * kLine; });
    }
  }
}

// Block (split, slab) of the modalities laid end to end.
template <class E, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) inputs(const __grid_constant__ InputPass p) {
  extern __shared__ __align__(128) char shared[];
  int m = 0, block = blockIdx.x;
  while (block >= p.input[m].slabs * p.input[m].splits) {
    block -= p.input[m].slabs * p.input[m].splits;
    ++m;
  }
  const Input& in = p.input[m];
  by_storage<E>(in, [&](auto stored) {
    input_slab<E, kWidth, decltype(stored)>(p, shared, m, block % in.slabs, block / in.slabs);
  });
}

}  // namespace fastadapters::cuda::fusion

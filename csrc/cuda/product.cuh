// Products of tiles in shared memory.
#pragma once

#include "tile.cuh"

namespace fastadapters::cuda {

// One operand of a product: panels `stride` bytes apart. If kTransposed, a row of the panels is one
// value of the summed index; else a row is one row of the result (or one column, for the right
// operand). `origin`: the warp's first row or column of the result.
struct Operand {
  const char* panels;
  int stride;
  int origin;
};

// acc += a b over kSteps times 32 bytes (of E) of the summed index where rows hold it, the same
// number of elements where columns do. `a` may be stored as fp32 (S) and multiplied in 16 bits: it
// is rounded on its way. `shift` is subtracted from the rows of an untransposed fp32 `a`. If kSum,
// for 16-bit products, each element of a row of `sums` has the sum of that row of `a` added.
//
// An origin is a multiple of the warp's extent, so a segment's number is a sum without carries of a
// part that depends on the lane, permuted once, and a constant: `^` adds them.
template <class E, int kSteps, bool kTransposedA, bool kTransposedB, class S = E, bool kSum = false,
          int kM, int kN>
__device__ __forceinline__ void multiply(float (&acc)[kM][kN][4], Operand a, Operand b,
                                         const float (&shift)[kM][2], float (*sums)[4] = nullptr) {
  constexpr int kSize = sizeof(typename E::T);
  constexpr int kDepth = 32 / kSize;  // elements of the summed index in a step
  constexpr bool kRounded = kSize == 2 && sizeof(typename S::T) == 4;
  const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
  if constexpr (E::kTensorCore) {
    const int row = lane % 8, first = lane / 8 % 2, second = lane / 16;
    // Transposed fp32 rounded to 16 bits: a lane's pair of summed values is rows pair and pair + 4,
    // for both operands, so that its loads meet each bank once.
    const int right_depth = kRounded && kTransposedA ? row / 2 + row % 2 * 4 : row;
    const char *left_row, *right_row;
    int left_segment, right_segment;
    // Transposed fp32 goes element by element, its rows pair and pair + 4.
    const auto element_row = [&](Operand o, int* segment) {
      const int column = o.origin % (kLine / 4) + group;
      *segment = (column / 4 ^ permute(pair)) << 4;
      return o.panels + o.origin / (kLine / 4) * o.stride + pair * kLine + column % 4 * 4;
    };
    if constexpr (!kTransposedA && kRounded) {
      left_row = a.panels + (a.origin + group) * kLine + pair % 2 * 8;
      left_segment = (pair / 2 ^ permute(group)) << 4;
    } else if constexpr (!kTransposedA) {
      left_row = a.panels + (a.origin + 8 * first + row) * kLine;
      left_segment = (second ^ permute(row)) << 4;
    } else if constexpr (kSize == 2 && !kRounded) {
      left_row = a.panels + (8 * second + row) * kLine;
      left_segment = ((a.origin / 8 + first) ^ permute(row)) << 4;
    } else {
      left_row = element_row(a, &left_segment);
    }
    if constexpr (!kTransposedB) {
      right_row = b.panels + (b.origin + 8 * second + row) * kLine;
      right_segment = (first ^ permute(row)) << 4;
    } else if constexpr (kSize == 2) {
      right_row = b.panels + (8 * first + right_depth) * kLine;
      right_segment = ((b.origin / 8 + second) ^ permute(right_depth)) << 4;
    } else {
      right_row = element_row(b, &right_segment);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int along_row = 32 * step % kLine;  // of a summed index that rows hold
      uint32_t left[kM][4], right[kN][2];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        if constexpr (kRounded) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float v[2];
            if constexpr (kTransposedA) {
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const int constant = (4 * m + i % 2 * 2) * 16 ^ permute(e * 4) * 16;
                v[e] = *reinterpret_cast<const float*>(left_row +
                                                       (kDepth * step + i / 2 * 8 + e * 4) * kLine +
                                                       (constant ^ left_segment));
              }
            } else {
              const float2 from = load_pair<S>(left_row + 64 * step / kLine * a.stride +
                                               (16 * m + i % 2 * 8) * kLine +
                                               ((64 * step % kLine + i / 2 * 32) ^ left_segment));
              v[0] = from.x - shift[m][i % 2], v[1] = from.y - shift[m][i % 2];
            }
            left[m][i] = E::pack(v[0], v[1]);
          }
        } else if constexpr (!kTransposedA) {
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
            const int constant = (2 * n + i / 2 * 2) * 16 % kLine ^ permute(i % 2 * 4) * 16;
            four[i] = *reinterpret_cast<const uint32_t*>(right_row + 32 * n / kLine * b.stride +
                                                         (kDepth * step + i % 2 * 4) * kLine +
                                                         (constant ^ right_segment));
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
        if constexpr (kSum) {
          const uint32_t ones[2] = {E::pack(1, 1), E::pack(1, 1)};
          E::mma(sums[m], left[m], ones);
        }
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

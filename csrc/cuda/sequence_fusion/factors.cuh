// From dy to dP and dU: backward's first part.
#pragma once

#include "fuse.cuh"

namespace fastadapters::cuda::fusion {

// Two steps, G in two panels, and for each modality and thread F and the product of those before.
template <class E>
struct FactorLayout {
  static constexpr int kG = kTile * kLine;
  static constexpr int kGradient = 2 * Step<E>::kBytes;
  static constexpr int kKept = kGradient + 2 * kG;
  static constexpr int kKeptBytes = kThreads * 64;

  static __host__ __device__ int bytes(int modalities) { return kKept + modalities * kKeptBytes; }
};

// A tile of rows (b, o) below `last` and columns, for one q; it goes on with the sums over rows
// (dU) and columns (dP) of the groups where it is not the first.
template <class E>
__device__ __forceinline__ void factor_tile(const Problem& p, char* shared, int q, int first,
                                            int last, int column, int row_group, bool first_rows,
                                            int column_group, bool first_columns) {
  using L = Step<E>;
  using S = FactorLayout<E>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, pair = lane % 4;
  const float no_shift[1][2] = {};
  const auto read = [&](const Input& in, int, int64_t at, int valid, auto& values) {
    add_floats(values, in.products + at, valid);
  };
  // F (half 0) of a modality, or the product of dy and the F before it.
  const auto kept = [&](int m, int half) {
    return reinterpret_cast<float4*>(shared + S::kKept + m * S::kKeptBytes) + 2 * half * kThreads +
           threadIdx.x;
  };

  float running[2][4] = {};  // dy times the F before; on the way back the product of those behind
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Place at(first, column, i / 2, i % 2);
    if (at.row >= last) continue;
    const char* const row =
        p.out.data + at.row / p.out_len * p.out.strides[1] + at.row % p.out_len * p.out.strides[2];
    const float2 v = load_two<E>(row, at.column, p.dim - at.column, p.wide_out);
    running[i / 2][i % 2 * 2] = v.x, running[i / 2][i % 2 * 2 + 1] = v.y;
  }

  Parts part;
  int buffer = 0;
  fill_step<E>(p, shared, part, q, first, last, column, read);
  float factor[1][2][4] = {};
  while (true) {
    __syncthreads();
    const char* const step = shared + buffer * L::kBytes;
    Parts following = part;
    following.next(p);
    const bool end = following.m == p.modalities;
    if (!end) {
      buffer ^= 1;
      fill_step<E>(p, shared + buffer * L::kBytes, following, q, first, last, column, read);
    }
    expand<E>(factor, step);
    if (part.last(p)) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float* const f = factor[0][n];
        float* const r = running[n];
        kept(part.m, 0)[n * kThreads] = {f[0], f[1], f[2], f[3]};
        kept(part.m, 1)[n * kThreads] = {r[0], r[1], r[2], r[3]};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          r[i] *= f[i];
          f[i] = 0;
        }
      }
    }
    if (end) break;
    part = following;
  }

  // The way back begins with the last step, and the one before is still there, too.
#pragma unroll
  for (int i = 0; i < 8; ++i) running[i / 4][i % 4] = 1;
  int resident = 2;
  while (part.m >= 0) {
    const Input& in = p.input[part.m];
    char* const gradient = shared + S::kGradient + part.m % 2 * S::kG;
    if (part.last(p)) {
      const Fragment<E> place(warp / 2 * 16, warp % 2 * 16, 0);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float4 f = kept(part.m, 0)[n * kThreads], g = kept(part.m, 1)[n * kThreads];
        float* const r = running[n];
        store_pair<E>(gradient + place(0, n), g.x * r[0], g.y * r[1]);
        store_pair<E>(gradient + place(1, n), g.z * r[2], g.w * r[3]);
        r[0] *= f.x, r[1] *= f.y, r[2] *= f.z, r[3] *= f.w;
      }
    }
    __syncthreads();
    const char* const step = shared + buffer * L::kBytes;
    buffer ^= 1;
    Parts following = part;
    following.previous(p);
    if (--resident < 1 && following.m >= 0) {
      fill_step<E>(p, shared + buffer * L::kBytes, following, q, first, last, column, read);
    }
    if (warp < 2) {
      if (in.d_feature_factor) {  // P^T G
        float sum[1][2][4];
        const auto each = [&](auto visit) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = part.begin + i % 2 * 8 + group;
            const int at = column + 16 * warp + i / 2 * 8 + 2 * pair;
            if (row >= in.width) continue;
            float* const to = in.d_feature_factor +
                              ((int64_t(row_group) * p.rank + q) * in.width + row) * p.dim + at;
            visit(to, p.dim - at, sum[0][i / 2] + i % 2 * 2);
          }
        };
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[0][i / 4][i % 4] = 0;
        each([&](float* to, int valid, float* value) {
          const float2 v = load_two(to, valid, first_rows);
          value[0] = v.x, value[1] = v.y;
        });
        multiply<E, L::kSize, true, true>(sum, {step, 0, 0}, {gradient, 0, 16 * warp}, no_shift);
        each([&](float* to, int valid, float* value) { store_two(to, valid, value[0], value[1]); });
      }
    } else if (in.d_products) {  // G U^T
      float sum[1][2][4] = {};
      const auto each = [&](auto visit) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = first + 16 * (warp - 2) + i % 2 * 8 + group;
          const int at = part.begin + i / 2 * 8 + 2 * pair;
          if (row >= last) continue;
          const int64_t line =
              ((int64_t(column_group) * p.items + row / p.out_len) * p.rank + q) * p.out_len +
              row % p.out_len;
          visit(in.d_products + line * in.width + at, in.width - at, sum[0][i / 2] + i % 2 * 2);
        }
      };
      each([&](float* to, int valid, float* value) {
        const float2 v = load_two(to, valid, first_columns);
        value[0] = v.x, value[1] = v.y;
      });
      multiply<E, L::kSize, false, false>(sum, {gradient, 0, 16 * (warp - 2)},
                                          {step + L::kStride, 0, 0}, no_shift);
      each([&](float* to, int valid, float* value) { store_two(to, valid, value[0], value[1]); });
    }
    part = following;
  }
}

}  // namespace fastadapters::cuda::fusion

// A block owns 64 rows of one head and walks over the rows that these meet, some at a time: first
// the texts, then the images. A warp has 16 of its rows.
//
// Where both sides are images a row meets those of its own item only; a block then walks over the
// items that its rows are of.
#pragma once

#include "../product.cuh"
#include "problem.cuh"

namespace fastadapters::cuda::attention {

// Of products in E with heads of up to kWidth, of whose own side kOperands are multiplied, and of
// the other side two: where things lie in shared memory.
template <class E, int kWidth, int kOperands>
struct Layout {
  using T = typename E::T;
  static constexpr int kSize = sizeof(T);
  static constexpr int kBytes = kWidth * kSize;  // of a row
  static constexpr int kPanels = kBytes > kLine ? kBytes / kLine : 1;
  static constexpr int kColumns = kWidth / kPanels;
  static constexpr int kOwn = kPanels * kPanel;
  // Rows of the other side at a time, and how many such stages there are.
  static constexpr int kOther = (kWidth <= 64 ? 128 : 64) / kSize;
  static constexpr int kOtherPanel = kOther * kLine;
  static constexpr int kOtherOperand = kPanels * kOtherPanel;
  static constexpr int kStage = 2 * kOtherOperand;
  static constexpr int kStages = kBytes > 256 ? 1 : 2;
  static constexpr int kFirstStage = kOperands * kOwn;
  static constexpr int kWeights = kFirstStage + kStages * kStage;
  static constexpr int kTotal = kWeights + kOperands * kPanel;
};

// Accumulators of a warp's rows: [16, kOther] of scores, [16, kWidth] of sums, a panel at a time.
template <class L>
using Scores = float[1][L::kOther / 8][4];
template <class L>
using Sums = float[L::kPanels][1][L::kColumns / 8][4];

// Brings rows [first, end) of at most kCount to panels.
template <class L, int kCount>
__device__ __forceinline__ void bring(char* panels, const Tokens& t, int group, int head, int first,
                                      int end, int width) {
#pragma unroll
  for (int i = 0; i < L::kPanels; ++i) {
    const int begin = i * kLine;
    load_panel<typename L::T, kCount, L::kBytes / L::kPanels>(
        panels + i * kCount * kLine, end - first, width * L::kSize - begin, t.aligned,
        [&](int row) { return row_of(t, group, head, first + row) + begin; });
  }
}

// Which rows a block walks over, kOther at a time: texts [0, texts), images [begin, end). Nothing
// here is an array: registers have no index.
template <int kOther>
struct Walk {
  int texts = 0, begin = 0, end = 0;

  __device__ __forceinline__ int first(int modality) const { return modality == kText ? 0 : begin; }
  __device__ __forceinline__ int last(int modality) const {
    return modality == kText ? texts : end;
  }
  __device__ __forceinline__ int text_steps() const { return (texts + kOther - 1) / kOther; }
  __device__ __forceinline__ int steps() const {
    return text_steps() + (end - begin + kOther - 1) / kOther;
  }
};

// The images of the items that rows [first, first + kRows) are of.
template <int kOther>
__device__ __forceinline__ void add_own_items(Walk<kOther>* walk, const Problem& p, int first) {
  const int last = min(first + kRows, p.rows[kImage]) - 1;
  walk->begin = first / p.images * p.images;
  walk->end = (last / p.images + 1) * p.images;
}

// The columns [x, y) of a walk that a row meets.
template <int kOther>
__device__ __forceinline__ int2 met_by(const Walk<kOther>& walk, int modality, bool own_item,
                                       int images, int row) {
  if (!own_item) return {walk.first(modality), walk.last(modality)};
  const int begin = row / images * images;
  return {begin, min(begin + images, walk.end)};
}

// Runs a step for each tile of the other side: step(stage, modality, first row).
template <class L, class Bring, class Step>
__device__ __forceinline__ void walk_over(const Walk<L::kOther>& walk, char* stages,
                                          Bring bring_rows, Step step) {
  const auto place = [&](int i, auto use) {
    const int texts = walk.text_steps(), modality = i < texts ? kText : kImage;
    const int first = walk.first(modality) + (i - (modality == kText ? 0 : texts)) * L::kOther;
    use(stages + i % L::kStages * L::kStage, modality, first);
  };
  const int count = walk.steps();
  if (count > 0) place(0, bring_rows);
  copy_commit();
  for (int i = 0; i < count; ++i) {
    copy_wait<0>();
    __syncthreads();
    if (L::kStages == 2 && i + 1 < count) place(i + 1, bring_rows);
    if (L::kStages == 2) copy_commit();
    place(i, step);
    if (L::kStages == 1 && i + 1 < count) {
      __syncthreads();  // the rows have been used
      place(i + 1, bring_rows);
      copy_commit();
    }
  }
}

// scores += own rows times other rows, along d.
template <class E, class L>
__device__ __forceinline__ void multiply_rows(Scores<L>& scores, const char* own,
                                              const char* other) {
  const float no_shift[1][2] = {};
  multiply<E, L::kBytes / 32, false, false>(scores, {own, kPanel, int(threadIdx.x / 32 * 16)},
                                            {other, L::kOtherPanel, 0}, no_shift);
}

// The weights of a warp's rows, for `average` of the same warp.
template <class E, class L>
__device__ __forceinline__ void put_weights(char* weights, const Scores<L>& scores) {
  const Fragment<E> place(threadIdx.x / 32 * 16, 0, kPanel);
#pragma unroll
  for (int i = 0; i < L::kOther / 4; ++i) {
    const float* const value = scores[0][i / 2] + i % 2 * 2;
    store_pair<E>(weights + place(i % 2, i / 2), value[0], value[1]);
  }
}

// sums += weights times other rows, along these.
template <class E, class L>
__device__ __forceinline__ void average(Sums<L>& sums, const char* weights, const char* other) {
  const float no_shift[1][2] = {};
#pragma unroll
  for (int i = 0; i < L::kPanels; ++i) {
    multiply<E, L::kOther * L::kSize / 32, false, true>(
        sums[i], {weights, kPanel, int(threadIdx.x / 32 * 16)},
        {other + i * L::kOtherPanel, L::kOtherPanel, 0}, no_shift);
  }
}

// f(half, row, column, a lane's two neighbouring sums) for all of a warp's rows.
template <class L, class F>
__device__ __forceinline__ void each_pair(Sums<L>& sums, F f) {
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int panel = 0; panel < L::kPanels; ++panel) {
#pragma unroll
    for (int i = 0; i < L::kColumns / 4; ++i) {
      f(i % 2, row + i % 2 * 8, panel * L::kColumns + i / 2 * 8 + column,
        sums[panel][0][i / 2] + i % 2 * 2);
    }
  }
}

// f(score, column) for a lane's scores in one of its two rows, 8 apart.
template <class L, class F>
__device__ __forceinline__ void each_score(Scores<L>& scores, int half, int begin, F f) {
#pragma unroll
  for (int i = 0; i < L::kOther / 4; ++i) {
    f(scores[0][i / 2][2 * half + i % 2], begin + i / 2 * 8 + int(threadIdx.x) % 4 * 2 + i % 2);
  }
}

// Two neighbouring columns of a row [width] in fp32.
__device__ __forceinline__ void store_two(float* row, int column, int width, const float* pair) {
  float* const to = row + column;
  if (column + 1 < width && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
    *reinterpret_cast<float2*>(to) = {pair[0], pair[1]};
  } else {
    if (column < width) to[0] = pair[0];
    if (column + 1 < width) to[1] = pair[1];
  }
}

// Rows from `first` to `end` of t, by way of panels of which each warp has used its own rows only,
// before it last waited for its lanes.
template <class E, class L>
__device__ __forceinline__ void store_rows(char* panels, Sums<L>& sums, const Tokens& t, int group,
                                           int head, int first, int end, int width) {
  const Fragment<E> place(threadIdx.x / 32 * 16, 0, kPanel);
#pragma unroll
  for (int panel = 0; panel < L::kPanels; ++panel) {
#pragma unroll
    for (int i = 0; i < L::kColumns / 4; ++i) {
      const float* const value = sums[panel][0][i / 2] + i % 2 * 2;
      store_pair<E>(panels + panel * kPanel + place(i % 2, i / 2), value[0], value[1]);
    }
  }
  __syncthreads();
  // There is nothing in the second half of shorter rows.
  if (int(threadIdx.x) % kSegments * 16 >= L::kBytes / L::kPanels) return;
#pragma unroll
  for (int panel = 0; panel < L::kPanels; ++panel) {
    const int begin = panel * kLine;
    store_panel<typename L::T>(
        panels + panel * kPanel, end - first, width * L::kSize - begin, t.aligned,
        [&](int row) { return row_of(t, group, head, first + row) + begin; });
  }
}

}  // namespace fastadapters::cuda::attention

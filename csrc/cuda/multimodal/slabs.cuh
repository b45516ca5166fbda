// Sums cut into parts, each with a slab of its own, which are added in a fixed order.
#pragma once

#include <algorithm>

#include "stage.cuh"

namespace fastadapters::cuda::head {

// Parts of a sum whose slabs are added later, so that `tiles` times the parts fill the processors;
// a part has at least 4 steps.
inline int splits_of(int tiles, int depth, int processors) {
  const int steps = (depth + kDepth - 1) / kDepth;
  return std::max(1, std::min({2 * processors / std::max(tiles, 1), steps / 4, 16}));
}

inline int tiles_of(int m, int n) {
  return ((m + kTileM - 1) / kTileM) * ((n + kTileN - 1) / kTileN);
}

// The slabs of a weight's gradient and of its bias's, and the sums of them.
struct Slabs {
  float *weight = nullptr, *bias = nullptr;
  int splits = 1, batches = 1;
  int64_t size = 0, bias_size = 0;

  Slabs(Arena* arena, bool wanted, int m, int n, int depth, int processors, int batch_count = 1)
      : splits(splits_of(tiles_of(m, n), depth, processors)),
        batches(batch_count),
        size(int64_t(m) * n),
        bias_size(int64_t(m) * batch_count) {
    if (!wanted) return;
    weight = arena->take<float>(splits * size * 4);
    bias = arena->take<float>(splits * bias_size * 4);
  }
  void aim(Product* p, int stride) const {
    p->splits = splits;
    p->out = {weight}, p->out_stride = stride, p->out_slab = size;
    p->tail = {bias}, p->tail_slab = bias_size;
  }
  Sum weights(const Parameter& to) const { return {weight, splits, size, size, 1, to}; }
  Sum biases(const Parameter& to) const {
    return {bias, splits * batches, bias_size / batches, bias_size / batches, 1.0f / batches, to};
  }
};

}  // namespace fastadapters::cuda::head

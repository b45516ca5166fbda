// The gradients of the parameters as sums of the partial ones, in order.
#pragma once

#include "problem.cuh"

namespace fastadapters::cuda::fusion {

// `count` partial sums [sizes[0], sizes[1], sizes[2]], the last two of which have `strides` between
// their elements, are `apart`; the sum's strides are `to`. From `limit` on along the last dimension
// there is nothing to sum. The sum is stored `copies` times, `copy_apart`.
struct Job {
  Parameter sum;
  const float* partials = nullptr;
  int count = 0, limit = 0, copies = 1;
  int sizes[3] = {1, 1, 1};
  int64_t apart = 0, from[3] = {}, to[3] = {}, copy_apart = 0;
  int blocks = 0;
};

struct Jobs {
  int count = 0;
  Job job[4 * kMaxModalities];
};

constexpr int kReduceThreads = 256;

static __global__ void __launch_bounds__(kReduceThreads) reduce(const __grid_constant__ Jobs p) {
  int job = 0, block = blockIdx.x;
  while (block >= p.job[job].blocks) block -= p.job[job++].blocks;
  const Job& j = p.job[job];
  const int64_t element = int64_t(block) * kReduceThreads + threadIdx.x;
  const int last = int(element % j.sizes[2]);
  const int64_t rest = element / j.sizes[2];
  const int middle = int(rest % j.sizes[1]);
  const int64_t first = rest / j.sizes[1];
  if (first >= j.sizes[0]) return;
  float sum = 0;
  if (last < j.limit) {
    const float* const from =
        j.partials + first * j.from[0] + middle * j.from[1] + last * j.from[2];
#pragma unroll 4
    for (int i = 0; i < j.count; ++i) sum += from[i * j.apart];
  }
  const int64_t to = first * j.to[0] + middle * j.to[1] + last * j.to[2];
  for (int i = 0; i < j.copies; ++i) store(j.sum, to + i * j.copy_apart, sum);
}

}  // namespace fastadapters::cuda::fusion

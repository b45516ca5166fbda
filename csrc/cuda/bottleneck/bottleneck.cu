#include <algorithm>
#include <stdexcept>

#include "../launch.cuh"
#include "bottleneck.h"

namespace fastadapters::cuda {

// Each dtype of the products has a source file of its own, and another for rows of several
// adapters.
template <class E, bool kGrouped, class Op>
void run(const Op& op, const Groups& groups, Arena* arena, cudaStream_t stream);

namespace {

// A split is one of 65535 blocks. See fastadapters/cuda_limits.py.
constexpr int64_t kMostAdapters = 60000;

template <bool kGrouped, class Op>
void dispatch(const Op& op, const Groups& groups, bool tf32, Arena* arena, void* stream) {
  const auto to = static_cast<cudaStream_t>(stream);
  switch (op.dtype) {
    case Dtype::bfloat16:
      return run<BFloat16, kGrouped>(op, groups, arena, to);
    case Dtype::float16:
      return run<Float16, kGrouped>(op, groups, arena, to);
    default:
      return tf32 ? run<Float32<true>, kGrouped>(op, groups, arena, to)
                  : run<Float32<false>, kGrouped>(op, groups, arena, to);
  }
}

template <bool kGrouped, class Op>
int64_t workspace_of(const Op& op, const Groups& groups) {
  Arena arena;
  dispatch<kGrouped>(op, groups, false, &arena, nullptr);
  return arena.used;
}

template <bool kGrouped, class Op>
void run_in(const Op& op, const Groups& groups, bool tf32, void* workspace, void* stream) {
  const int64_t columns = std::max({op.dim, op.out_dim, op.bottleneck});
  const int64_t chunks = op.count() / groups.rows_each / 256 + 1;
  if (op.count() > INT32_MAX - kRows || columns > INT32_MAX / 16 ||
      groups.adapters > kMostAdapters ||
      groups.adapters + 1 > INT32_MAX / std::max(columns, chunks)) {
    throw std::runtime_error(
        "fastadapters: too many rows, columns or adapters for the CUDA kernels");
  }
  Arena arena{static_cast<char*>(workspace), false};
  dispatch<kGrouped>(op, groups, tf32, &arena, stream);
}

}  // namespace

int64_t bottleneck_forward_workspace(const BottleneckForward& op) {
  return workspace_of<false>(op, {});
}

int64_t bottleneck_backward_workspace(const BottleneckBackward& op) {
  return workspace_of<false>(op, {});
}

int64_t grouped_forward_workspace(const GroupedForward& op) {
  return workspace_of<true, BottleneckForward>(op, op.groups);
}

int64_t grouped_backward_workspace(const GroupedBackward& op) {
  return workspace_of<true, BottleneckBackward>(op, op.groups);
}

void bottleneck_forward(const BottleneckForward& op, bool tf32, void* workspace, void* stream) {
  run_in<false>(op, {}, tf32, workspace, stream);
}

void bottleneck_backward(const BottleneckBackward& op, bool tf32, void* workspace, void* stream) {
  run_in<false>(op, {}, tf32, workspace, stream);
}

void grouped_forward(const GroupedForward& op, bool tf32, void* workspace, void* stream) {
  run_in<true, BottleneckForward>(op, op.groups, tf32, workspace, stream);
}

void grouped_backward(const GroupedBackward& op, bool tf32, void* workspace, void* stream) {
  run_in<true, BottleneckBackward>(op, op.groups, tf32, workspace, stream);
}

}  // namespace fastadapters::cuda

#include <algorithm>
#include <stdexcept>

#include "../launch.cuh"
#include "bottleneck.h"

namespace fastadapters::cuda {

// Each dtype of the products has a source file of its own.
template <class E, class Op>
void run(const Op& op, Arena* arena, cudaStream_t stream);

namespace {

template <class Op>
void dispatch(const Op& op, bool tf32, Arena* arena, void* stream) {
  const auto to = static_cast<cudaStream_t>(stream);
  switch (op.dtype) {
    case Dtype::bfloat16:
      return run<BFloat16>(op, arena, to);
    case Dtype::float16:
      return run<Float16>(op, arena, to);
    default:
      return tf32 ? run<Float32<true>>(op, arena, to) : run<Float32<false>>(op, arena, to);
  }
}

template <class Op>
int64_t workspace_of(const Op& op) {
  Arena arena;
  dispatch(op, false, &arena, nullptr);
  return arena.used;
}

template <class Op>
void run_in(const Op& op, bool tf32, void* workspace, void* stream) {
  if (op.count() > INT32_MAX - kRows || std::max(op.dim, op.out_dim) > INT32_MAX / 8 ||
      op.bottleneck > INT32_MAX / 16) {
    throw std::runtime_error("fastadapters: too many rows or columns for the CUDA kernels");
  }
  Arena arena{static_cast<char*>(workspace), false};
  dispatch(op, tf32, &arena, stream);
}

}  // namespace

int64_t bottleneck_forward_workspace(const BottleneckForward& op) { return workspace_of(op); }
int64_t bottleneck_backward_workspace(const BottleneckBackward& op) { return workspace_of(op); }

void bottleneck_forward(const BottleneckForward& op, bool tf32, void* workspace, void* stream) {
  run_in(op, tf32, workspace, stream);
}

void bottleneck_backward(const BottleneckBackward& op, bool tf32, void* workspace, void* stream) {
  run_in(op, tf32, workspace, stream);
}

}  // namespace fastadapters::cuda

#include <stdexcept>

#include "../launch.cuh"
#include "sequence_fusion.h"

namespace fastadapters::cuda {

namespace fusion {

// Each dtype of the products has a source file of its own.
template <class E>
void run(const SequenceFusionForward& op, Arena* arena, cudaStream_t stream);
template <class E>
void run(const SequenceFusionBackward& op, Arena* arena, cudaStream_t stream);

}  // namespace fusion

namespace {

template <class Op>
void dispatch(const Op& op, bool tf32, Arena* arena, void* stream) {
  const auto to = static_cast<cudaStream_t>(stream);
  switch (op.dtype) {
    case Dtype::bfloat16:
      return fusion::run<BFloat16>(op, arena, to);
    case Dtype::float16:
      return fusion::run<Float16>(op, arena, to);
    default:
      return tf32 ? fusion::run<Float32<true>>(op, arena, to)
                  : fusion::run<Float32<false>>(op, arena, to);
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
  bool fits = op.dim <= INT32_MAX / 8 && op.items * op.out_len <= INT32_MAX - kRows;
  for (int m = 0; m < op.modalities; ++m) {
    const Modality& in = op.modality[m];
    fits &= op.items * in.tokens <= INT32_MAX - kRows && in.dim <= INT32_MAX / 8;
  }
  if (!fits) {
    throw std::runtime_error("fastadapters: too many rows or columns for the CUDA kernels");
  }
  Arena arena{static_cast<char*>(workspace), false};
  dispatch(op, tf32, &arena, stream);
}

}  // namespace

int64_t sequence_fusion_forward_workspace(const SequenceFusionForward& op) {
  return workspace_of(op);
}
int64_t sequence_fusion_backward_workspace(const SequenceFusionBackward& op) {
  return workspace_of(op);
}

void sequence_fusion_forward(const SequenceFusionForward& op, bool tf32, void* workspace,
                             void* stream) {
  run_in(op, tf32, workspace, stream);
}

void sequence_fusion_backward(const SequenceFusionBackward& op, bool tf32, void* workspace,
                              void* stream) {
  run_in(op, tf32, workspace, stream);
}

}  // namespace fastadapters::cuda

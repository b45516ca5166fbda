#include <stdexcept>

#include "cross_modal_attention.h"
#include "problem.cuh"

namespace fastadapters::cuda {

namespace attention {

// Each dtype has a source file of its own.
template <class E, class Op>
void run(const Op& op, Arena* arena, cudaStream_t stream);

}  // namespace attention

namespace {

template <class Op>
void dispatch(const Op& op, Arena* arena, void* stream) {
  const auto to = static_cast<cudaStream_t>(stream);
  switch (op.dtype) {
    case Dtype::bfloat16:
      return attention::run<BFloat16>(op, arena, to);
    case Dtype::float16:
      return attention::run<Float16>(op, arena, to);
    default:
      return attention::run<Float32<false>>(op, arena, to);
  }
}

void check_sizes(const CrossModalAttention& op) {
  if (op.width > 128) {
    throw std::runtime_error("fastadapters: d = " + std::to_string(op.width) +
                             " is too large for the CUDA kernels of cross_modal_attention: 128");
  }
  if (op.texts > INT32_MAX - kRows || op.items * op.images > INT32_MAX - kRows ||
      op.heads > INT32_MAX / 128) {
    throw std::runtime_error("fastadapters: too many tokens or heads for the CUDA kernels");
  }
}

template <class Op>
int64_t workspace_of(const Op& op) {
  check_sizes(op);
  Arena arena;
  dispatch(op, &arena, nullptr);
  return arena.used;
}

}  // namespace

int64_t cross_modal_attention_state(const CrossModalAttention& op) {
  return attention::StateSizes(op).total();
}

int64_t cross_modal_attention_forward_workspace(const CrossModalAttentionForward& op) {
  return workspace_of(op);
}
int64_t cross_modal_attention_backward_workspace(const CrossModalAttentionBackward& op) {
  return workspace_of(op);
}

void cross_modal_attention_forward(const CrossModalAttentionForward& op, bool, void* workspace,
                                   void* stream) {
  Arena arena{static_cast<char*>(workspace), false};
  dispatch(op, &arena, stream);
}

void cross_modal_attention_backward(const CrossModalAttentionBackward& op, bool, void* workspace,
                                    void* stream) {
  Arena arena{static_cast<char*>(workspace), false};
  dispatch(op, &arena, stream);
}

}  // namespace fastadapters::cuda

#include "multimodal.h"
#include "run_backward.cuh"

namespace fastadapters::cuda {

int64_t multimodal_logits_state(const Multimodal& op) {
  head::Numbers n;
  head::lay_out(op, &n);
  return n.used;
}

int64_t multimodal_logits_forward_workspace(const MultimodalForward& op) {
  Arena arena;
  head::forward(op, &arena, nullptr);
  return arena.used;
}

int64_t multimodal_logits_backward_workspace(const MultimodalBackward& op) {
  Arena arena;
  head::backward(op, &arena, nullptr);
  return arena.used;
}

void multimodal_logits_forward(const MultimodalForward& op, bool, void* workspace, void* stream) {
  Arena arena{static_cast<char*>(workspace), false};
  head::forward(op, &arena, static_cast<cudaStream_t>(stream));
}

void multimodal_logits_backward(const MultimodalBackward& op, bool, void* workspace, void* stream) {
  Arena arena{static_cast<char*>(workspace), false};
  head::backward(op, &arena, static_cast<cudaStream_t>(stream));
}

}  // namespace fastadapters::cuda

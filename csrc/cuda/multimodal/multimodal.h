// The multi-modal adapter's head on NVIDIA GPUs, sm_80 and later. Pointers are to device memory;
// the calls return before the work is done and neither allocate nor wait, so that a CUDA graph can
// record them.
#pragma once

#include "../../multimodal.h"

namespace fastadapters::cuda {

// fp32 numbers of `state`.
int64_t multimodal_logits_state(const Multimodal& op);

// Bytes of device memory that the call below needs, aligned to 256. A forward without `state` works
// in the workspace alone.
int64_t multimodal_logits_forward_workspace(const MultimodalForward& op);
int64_t multimodal_logits_backward_workspace(const MultimodalBackward& op);

// On the current device and `stream` (a cudaStream_t). All products are IEEE fp32, whatever `tf32`.
// Throw std::runtime_error with what a launch said, or for sizes beyond 32-bit indices.
void multimodal_logits_forward(const MultimodalForward& op, bool tf32, void* workspace,
                               void* stream);
void multimodal_logits_backward(const MultimodalBackward& op, bool tf32, void* workspace,
                                void* stream);

}  // namespace fastadapters::cuda

// Cross-modal attention on NVIDIA GPUs, sm_80 and later. Pointers are to device memory; the calls
// return before the work is done and neither allocate nor wait, so that a CUDA graph can record
// them.
#pragma once

#include "../../cross_modal_attention.h"

namespace fastadapters::cuda {

// fp32 numbers of `state`.
int64_t cross_modal_attention_state(const CrossModalAttention& op);

// Bytes of device memory that the call below needs, aligned to 256.
int64_t cross_modal_attention_forward_workspace(const CrossModalAttentionForward& op);
int64_t cross_modal_attention_backward_workspace(const CrossModalAttentionBackward& op);

// On the current device and `stream` (a cudaStream_t). fp32 products are never rounded to TF32,
// whatever `tf32` allows. Throw std::runtime_error if d is above 128, for sizes beyond 32-bit
// indices, or with what a launch said.
void cross_modal_attention_forward(const CrossModalAttentionForward& op, bool tf32, void* workspace,
                                   void* stream);
void cross_modal_attention_backward(const CrossModalAttentionBackward& op, bool tf32,
                                    void* workspace, void* stream);

}  // namespace fastadapters::cuda

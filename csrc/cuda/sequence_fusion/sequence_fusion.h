// Sequence fusion on NVIDIA GPUs, sm_80 and later. Pointers are to device memory; the calls return
// before the work is done and neither allocate nor wait, so that a CUDA graph can record them.
#pragma once

#include "../../sequence_fusion.h"

namespace fastadapters::cuda {

// Bytes of device memory that the call below needs, aligned to 256.
int64_t sequence_fusion_forward_workspace(const SequenceFusionForward& op);
int64_t sequence_fusion_backward_workspace(const SequenceFusionBackward& op);

// On the current device and `stream` (a cudaStream_t). `tf32`: whether fp32 products may be rounded
// to TF32. Backward needs products and z as saved. Throw std::runtime_error if there are too many
// rows or columns, or with what a launch said.
void sequence_fusion_forward(const SequenceFusionForward& op, bool tf32, void* workspace,
                             void* stream);
void sequence_fusion_backward(const SequenceFusionBackward& op, bool tf32, void* workspace,
                              void* stream);

}  // namespace fastadapters::cuda

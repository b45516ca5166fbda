// The bottleneck on NVIDIA GPUs, sm_80 and later. Pointers are to device memory; the calls return
// before the work is done and neither allocate nor wait, so that a CUDA graph can record them.
#pragma once

#include "../../bottleneck.h"

namespace fastadapters::cuda {

// Bytes of device memory that the call below needs, aligned to 256.
int64_t bottleneck_forward_workspace(const BottleneckForward& op);
int64_t bottleneck_backward_workspace(const BottleneckBackward& op);
int64_t grouped_forward_workspace(const GroupedForward& op);
int64_t grouped_backward_workspace(const GroupedBackward& op);

// On the current device and `stream` (a cudaStream_t). `tf32`: whether fp32 products may be rounded
// to TF32. Throw std::runtime_error if r is too large for the shared memory of a block, or with
// what the launch said. Of grouped rows z and stats are in the order of the rows sorted by adapter;
// rows whose index names none become NaN, and have no part in the gradients of parameters.
void bottleneck_forward(const BottleneckForward& op, bool tf32, void* workspace, void* stream);
void bottleneck_backward(const BottleneckBackward& op, bool tf32, void* workspace, void* stream);
void grouped_forward(const GroupedForward& op, bool tf32, void* workspace, void* stream);
void grouped_backward(const GroupedBackward& op, bool tf32, void* workspace, void* stream);

}  // namespace fastadapters::cuda

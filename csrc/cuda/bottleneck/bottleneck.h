// The bottleneck's CUDA launchers. Pointers are to device memory; the calls return before the work
// is done and neither allocate nor wait, so that a CUDA graph can record them.
#pragma once

#include "../../bottleneck.h"

extern "C" {

// Bytes of device memory that the call below needs, aligned to 256.
int64_t fastadapters_bottleneck_forward_cuda_workspace(const fastadapters::BottleneckForward* op);
int64_t fastadapters_bottleneck_backward_cuda_workspace(const fastadapters::BottleneckBackward* op);

// On the current device and `stream` (a cudaStream_t). `tf32`: whether fp32 products may be rounded
// to TF32. Return a cudaError_t: 0, or cudaErrorInvalidConfiguration if r is too large for the
// shared memory of a block, or what the launch said.
int fastadapters_bottleneck_forward_cuda(const fastadapters::BottleneckForward* op, bool tf32,
                                         void* workspace, void* stream);
int fastadapters_bottleneck_backward_cuda(const fastadapters::BottleneckBackward* op, bool tf32,
                                          void* workspace, void* stream);

const char* fastadapters_cuda_error_string(int error);
}

// Runs an op's CPU or CUDA kernels.
#pragma once

#include "devices.h"
#include "marshal.h"

namespace fastadapters::ops {

#ifdef FASTADAPTERS_CUDA
// On the current stream of the device of `like`, with the memory that the kernels ask for. `fp32`:
// whether products are in fp32, which PyTorch may allow to be rounded.
template <class Op>
void run_cuda(const Op& args, const Tensor& like, bool fp32, int64_t (*workspace)(const Op&),
              void (*launch)(const Op&, bool, void*, void*)) {
  CudaStream stream(like);
  int64_t bytes = workspace(args);
  Tensor space = empty(like, {bytes / 4}, ScalarType::Float);
  launch(args, fp32 && allow_tf32(), bytes ? space.mutable_data_ptr() : nullptr, stream.get());
}
#endif

}  // namespace fastadapters::ops

// Where an op runs: the threads of the CPU kernels, the stream of the CUDA kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../cpu/threads.h"
#ifdef FASTADAPTERS_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

#ifndef FASTADAPTERS_NAMESPACE
#define FASTADAPTERS_NAMESPACE fastadapters
#endif

namespace fastadapters::ops {

// The CUDA kernels run on CUDA tensors; in a simulation of a GPU, which tests build, on all.
bool on_cuda(const torch::stable::Tensor& x);

// PyTorch's.
cpu::Threads threads();

#ifdef FASTADAPTERS_CUDA
// The current stream of x's device, which is the current device as long as this lives.
class CudaStream {
 public:
  explicit CudaStream(const torch::stable::Tensor& x);
  void* get() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

// PyTorch's setting.
bool allow_tf32();
#endif

}  // namespace fastadapters::ops

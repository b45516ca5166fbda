// Runs an op's CPU or CUDA kernels.
#pragma once

#include <type_traits>

#include "devices.h"
#include "marshal.h"

// Those of cpu::name and cuda::name, as far as they are in this build.
#ifdef FASTADAPTERS_SIMULATION
#define FASTADAPTERS_ON_CPU(name) nullptr
#else
#define FASTADAPTERS_ON_CPU(name) &cpu::name
#endif
#ifdef FASTADAPTERS_CUDA
#define FASTADAPTERS_KERNELS(name) {FASTADAPTERS_ON_CPU(name), &cuda::name##_workspace, &cuda::name}
#else
#define FASTADAPTERS_KERNELS(name) {FASTADAPTERS_ON_CPU(name)}
#endif

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

template <class Op>
struct Kernels {
  void (*cpu)(const Op&, const cpu::Threads&);
#ifdef FASTADAPTERS_CUDA
  int64_t (*workspace)(const Op&);
  void (*cuda)(const Op&, bool, void*, void*);
#endif
};

// On the device of `like`.
template <class Op>
void run(const Op& args, [[maybe_unused]] const Tensor& like, [[maybe_unused]] bool fp32,
         const std::common_type_t<Kernels<Op>>& kernels) {
#ifdef FASTADAPTERS_CUDA
  if (on_cuda(like)) return run_cuda(args, like, fp32, kernels.workspace, kernels.cuda);
#endif
  kernels.cpu(args, threads());
}

}  // namespace fastadapters::ops

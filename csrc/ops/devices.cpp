#include "devices.h"

#include <torch/csrc/stable/ops.h>

#ifdef FASTADAPTERS_CUDA
#define QUOTED(x) #x
#define NAME(x) QUOTED(x)

// In PyTorch's CUDA half, so absent from a CPU build of it.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace fastadapters::ops {

using torch::stable::Tensor;

bool on_cuda(const Tensor& x) {
#ifdef FASTADAPTERS_SIMULATION
  return x.defined();
#else
  return !x.is_cpu();
#endif
}

cpu::Threads threads() {
  auto run = [](int64_t n, void (*body)(int64_t, void*), void* context) {
    torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i, context);
    });
  };
  return {int(torch::stable::get_num_threads()), run};
}

#ifdef FASTADAPTERS_CUDA
CudaStream::CudaStream(const Tensor& x) {
  if (x.is_cpu()) return;  // simulated
  int32_t device = x.get_device_index();
  guard_.emplace(device);
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream &&
                      aoti_torch_get_current_cuda_stream(device, &stream_) == 0,
                  "fastadapters: this PyTorch has no CUDA streams");
}

// It is not on the stable ABI, but Python knows it (fastadapters/ops).
bool allow_tf32() {
  StableIValue result = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_call_dispatcher(NAME(FASTADAPTERS_NAMESPACE) "::allow_tf32", "", &result));
  return torch::stable::detail::to<bool>(result);
}
#endif

}  // namespace fastadapters::ops

#include "multimodal.h"

#include "../isa.h"
#include "kernels.h"

namespace fastadapters::cpu {
namespace {

// The features' dtype matters at loads and stores alone.
const MultimodalKernels* const kernels[kIsas] = {
#if defined(__x86_64__)
    nullptr,
    nullptr,
    &avx512_multimodal,
    &avx2_multimodal,
#else
    nullptr,
    nullptr,
    nullptr,
    nullptr,
#endif
    &portable_multimodal,
};

const MultimodalKernels& chosen() { return *kernels[int(isa(Dtype::float32))]; }

}  // namespace

int64_t multimodal_logits_state(const Multimodal& args) {
  return MultimodalState(args, nullptr).size;
}

void multimodal_logits_forward(const MultimodalForward& args, const Threads& threads) {
  chosen().forward(args, MultimodalState(args, args.state), threads);
}

void multimodal_logits_backward(const MultimodalBackward& args, const Threads& threads) {
  chosen().backward(args, MultimodalState(args, args.state), threads);
}

}  // namespace fastadapters::cpu

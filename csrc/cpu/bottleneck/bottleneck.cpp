#include "bottleneck.h"

#include "../isa.h"
#include "kernels.h"

namespace fastadapters::cpu {
namespace {

const BottleneckKernels* const kernels[kIsas][3] = {
#if defined(__x86_64__)
    {nullptr, &amx_bottleneck, nullptr},
    {nullptr, &avx512_bf16_bottleneck, nullptr},
    {&avx512_bottleneck[0], &avx512_bottleneck[1], &avx512_bottleneck[2]},
    {&avx2_bottleneck[0], &avx2_bottleneck[1], &avx2_bottleneck[2]},
#else
    {},
    {},
    {},
    {},
#endif
    {&portable_bottleneck[0], &portable_bottleneck[1], &portable_bottleneck[2]},
};

}  // namespace

void bottleneck_forward(const BottleneckForward& args, const Threads& threads) {
  choose(kernels, args.dtype).forward(args, threads);
}

void bottleneck_backward(const BottleneckBackward& args, const Threads& threads) {
  choose(kernels, args.dtype).backward(args, threads);
}

}  // namespace fastadapters::cpu

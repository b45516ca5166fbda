#include "bottleneck.h"

#include "../isa.h"
#include "groups.h"
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

void grouped_forward(const GroupedForward& args, const Threads& threads) {
  each_adapter<BottleneckForward>(args, args.groups, threads, choose(kernels, args.dtype).forward);
}

void grouped_backward(const GroupedBackward& args, const Threads& threads) {
  each_adapter<BottleneckBackward>(args, args.groups, threads,
                                   choose(kernels, args.dtype).backward);
}

}  // namespace fastadapters::cpu

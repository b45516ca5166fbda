// Empty where the compiler has no such instructions.
#if defined(__AVX512BF16__)
#include "../amx.h"

#include "backward.h"
#include "kernels.h"

namespace fastadapters::cpu {

const BottleneckKernels amx_bottleneck = {forward<AmxGemm, bfloat16>, backward<AmxGemm, bfloat16>};

}  // namespace fastadapters::cpu

#endif

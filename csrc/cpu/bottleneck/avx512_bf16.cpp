// Empty where the compiler has no such instructions.
#if defined(__AVX512BF16__)
#include "backward.h"
#include "kernels.h"

namespace fastadapters::cpu {

const BottleneckKernels avx512_bf16_bottleneck = {forward<Gemm<Pair>, bfloat16>,
                                                  backward<Gemm<Pair>, bfloat16>};

}  // namespace fastadapters::cpu

#endif

// Empty where the compiler has no such instructions.
#if defined(__AVX512BF16__)
#include "backward.h"
#include "kernels.h"

namespace fastadapters::cpu {

const SequenceFusionKernels avx512_bf16_sequence_fusion = {forward<Pair>, backward<Pair>};

}  // namespace fastadapters::cpu

#endif

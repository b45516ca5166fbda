#include "backward.h"
#include "kernels.h"

namespace fastadapters::cpu {

const BottleneckKernels avx512_bottleneck[3] = {
    {forward<Gemm<Single>, float>, backward<Gemm<Single>, float>},
    {forward<Gemm<Single>, bfloat16>, backward<Gemm<Single>, bfloat16>},
    {forward<Gemm<Single>, float16>, backward<Gemm<Single>, float16>},
};

}  // namespace fastadapters::cpu

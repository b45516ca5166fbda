#include "../amx.h"

#include "backward.h"
#include "kernels.h"

namespace fastadapters::cpu {

const BottleneckKernels amx_bottleneck = {forward<AmxGemm, bfloat16>, backward<AmxGemm, bfloat16>};

}  // namespace fastadapters::cpu

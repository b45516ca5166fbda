#include "backward.h"
#include "kernels.h"

namespace fastadapters::cpu {

const MultimodalKernels avx512_multimodal = {forward, backward};

}  // namespace fastadapters::cpu

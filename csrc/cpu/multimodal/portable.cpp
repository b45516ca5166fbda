#include "backward.h"
#include "kernels.h"

namespace fastadapters::cpu {

const MultimodalKernels portable_multimodal = {forward, backward};

}  // namespace fastadapters::cpu

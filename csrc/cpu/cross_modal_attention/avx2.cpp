#include "backward.h"
#include "kernels.h"

namespace fastadapters::cpu {

const CrossModalAttentionKernels avx2_cross_modal_attention = {forward, backward};

}  // namespace fastadapters::cpu

#include "backward.h"
#include "kernels.h"

namespace fastadapters::cpu {

const CrossModalAttentionKernels portable_cross_modal_attention = {forward, backward};

}  // namespace fastadapters::cpu

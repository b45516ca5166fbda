#include "backward.h"
#include "kernels.h"

namespace fastadapters::cpu {

const SequenceFusionKernels avx2_sequence_fusion = {forward<Single>, backward<Single>};

}  // namespace fastadapters::cpu

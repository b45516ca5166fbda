#include "backward.h"
#include "kernels.h"

namespace fastadapters::cpu {

const SequenceFusionKernels portable_sequence_fusion = {forward<Single>, backward<Single>};

}  // namespace fastadapters::cpu

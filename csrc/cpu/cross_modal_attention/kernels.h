// The kernels of cross-modal attention, which each instruction set's source file defines. They
// compute in fp32 whatever the dtype.
#pragma once

#include "../../cross_modal_attention.h"
#include "../threads.h"

namespace fastadapters::cpu {

struct CrossModalAttentionKernels {
  void (*forward)(const CrossModalAttentionForward&, const Threads&);
  void (*backward)(const CrossModalAttentionBackward&, const Threads&);
};

extern const CrossModalAttentionKernels avx512_cross_modal_attention, avx2_cross_modal_attention,
    portable_cross_modal_attention;

}  // namespace fastadapters::cpu

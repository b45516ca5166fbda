// The kernels of sequence fusion, which each instruction set's source file defines.
#pragma once

#include "../../sequence_fusion.h"
#include "../threads.h"

namespace fastadapters::cpu {

struct SequenceFusionKernels {
  void (*forward)(const SequenceFusionForward&, const Threads&);
  void (*backward)(const SequenceFusionBackward&, const Threads&);
};

extern const SequenceFusionKernels avx512_bf16_sequence_fusion;  // bf16 only
extern const SequenceFusionKernels avx512_sequence_fusion, avx2_sequence_fusion;
extern const SequenceFusionKernels portable_sequence_fusion;

}  // namespace fastadapters::cpu

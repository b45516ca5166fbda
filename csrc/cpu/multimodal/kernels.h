// The head's kernels, which each instruction set's source file defines. They compute in fp32.
#pragma once

#include "../../multimodal.h"
#include "../threads.h"
#include "state.h"

namespace fastadapters::cpu {

struct MultimodalKernels {
  void (*forward)(const MultimodalForward&, const MultimodalState&, const Threads&);
  void (*backward)(const MultimodalBackward&, const MultimodalState&, const Threads&);
};

extern const MultimodalKernels avx512_multimodal, avx2_multimodal, portable_multimodal;

}  // namespace fastadapters::cpu

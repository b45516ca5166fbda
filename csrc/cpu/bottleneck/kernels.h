// The bottleneck's kernels of one dtype, which each instruction set's source file defines.
#pragma once

#include "../../bottleneck.h"
#include "../threads.h"

namespace fastadapters::cpu {

struct BottleneckKernels {
  void (*forward)(const BottleneckForward&, const Threads&);
  void (*backward)(const BottleneckBackward&, const Threads&);
};

extern const BottleneckKernels amx_bottleneck, avx512_bf16_bottleneck;  // bf16 only
extern const BottleneckKernels avx512_bottleneck[3], avx2_bottleneck[3], portable_bottleneck[3];

}  // namespace fastadapters::cpu

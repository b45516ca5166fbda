// The kernels each instruction set's source file defines, and the CPU features they need.
#pragma once

#include "isa.h"

namespace fastadapters::cpu {

extern const BottleneckKernels amx_kernels, avx512_bf16_kernels;  // bf16 only
extern const BottleneckKernels avx512_kernels[3], avx2_kernels[3], portable_kernels[3];

}  // namespace fastadapters::cpu

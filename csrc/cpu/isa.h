// The instruction sets of the CPU backend. An op has a source file for each, which holds its
// kernels. One set is chosen once per process: the best one this CPU runs, or the one named by
// FASTADAPTERS_CPU_ISA.
#pragma once

#include "../tensors.h"

namespace fastadapters::cpu {

// Best first.
enum class Isa { amx, avx512_bf16, avx512, avx2, portable };
constexpr int kIsas = 5;

// The one in use. Throws std::invalid_argument where the one asked for is unknown or not supported
// here.
Isa isa();

// Of an op's kernels, by instruction set and dtype, those in use for `dtype`; where an entry is
// null, the next set has it.
template <class Kernels>
const Kernels& choose(const Kernels* const (&kernels)[kIsas][3], Dtype dtype) {
  int i = int(isa());
  while (!kernels[i][int(dtype)]) ++i;
  return *kernels[i][int(dtype)];
}

}  // namespace fastadapters::cpu

extern "C" {

// Supported instruction sets, best first, separated by commas.
__attribute__((visibility("default"))) const char* fastadapters_cpu_isas();
// The one in use, or the reason why FASTADAPTERS_CPU_ISA cannot be met.
__attribute__((visibility("default"))) const char* fastadapters_cpu_isa();
// Uses the named one from now on; false, and nothing changes, if it is not among the supported.
__attribute__((visibility("default"))) bool fastadapters_set_cpu_isa(const char* name);
}

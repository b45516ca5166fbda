// The instruction sets of the CPU backend. An op has a source file for each, which holds its
// kernels. Which one runs is decided once per process and dtype: the one FASTADAPTERS_CPU_ISA
// names, or the fastest that this CPU has.
#pragma once

#include <string>

#include "../tensors.h"

namespace fastadapters::cpu {

// Best first.
enum class Isa { amx, avx512_bf16, avx512, avx2, portable };
constexpr int kIsas = 5;

// The one whose kernels run for `dtype`. Throws std::invalid_argument where the one asked for is
// unknown or not supported here.
Isa isa(Dtype dtype);

// Of an op's kernels, by instruction set and dtype, those that run for `dtype`.
template <class Kernels>
const Kernels& choose(const Kernels* const (&kernels)[kIsas][3], Dtype dtype) {
  return *kernels[int(isa(dtype))][int(dtype)];
}

struct Choice {
  Isa isa;
  std::string reason;
};
// bf16 on a CPU that has both avx512_bf16 and avx512, from their multiply-adds per second: on some
// CPUs the one instruction does twice the work of an fp32 multiply-add, on others half of it.
Choice choose_bfloat16(double avx512_bf16, double avx512);

const char* name(Isa isa);

}  // namespace fastadapters::cpu

extern "C" {

// Supported instruction sets, best first, separated by commas.
__attribute__((visibility("default"))) const char* fastadapters_cpu_isas();
// The best one, or the one named; or the reason why FASTADAPTERS_CPU_ISA cannot be met.
__attribute__((visibility("default"))) const char* fastadapters_cpu_isa();
// The one whose kernels run for a dtype (of enum Dtype), and why: "avx2: the best of this CPU".
__attribute__((visibility("default"))) const char* fastadapters_cpu_isa_for(int32_t dtype);
// Uses the named one from now on; false, and nothing changes, if it is not among the supported.
__attribute__((visibility("default"))) bool fastadapters_set_cpu_isa(const char* name);
}

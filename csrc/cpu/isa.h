// The instruction sets of the CPU backend. Each has its own source file and is chosen once per
// process: the best one this CPU runs, or the one named by FASTADAPTERS_CPU_ISA.
#pragma once

#include <cstdint>

#include "../bottleneck.h"

namespace fastadapters::cpu {

// How a kernel gets its threads: run(n, body, context) calls body(i, context) once for each i < n,
// on at most `count` threads, and returns when all are done.
struct Threads {
  int count = 1;
  void (*run)(int64_t n, void (*body)(int64_t, void*), void* context) = nullptr;
};

// The kernels of one dtype on one instruction set.
struct BottleneckKernels {
  void (*forward)(const BottleneckForward&, const Threads&);
  void (*backward)(const BottleneckBackward&, const Threads&);
};

// Throw std::invalid_argument where the instruction set asked for is unknown or not supported here.
void bottleneck_forward(const BottleneckForward& args, const Threads& threads);
void bottleneck_backward(const BottleneckBackward& args, const Threads& threads);

}  // namespace fastadapters::cpu

extern "C" {

// Supported instruction sets, best first, separated by commas.
__attribute__((visibility("default"))) const char* fastadapters_cpu_isas();
// The one in use, or the reason why FASTADAPTERS_CPU_ISA cannot be met.
__attribute__((visibility("default"))) const char* fastadapters_cpu_isa();
// Uses the named one from now on; false, and nothing changes, if it is not among the supported.
__attribute__((visibility("default"))) bool fastadapters_set_cpu_isa(const char* name);
// out[4 * i + lane] of the Philox blocks counter .. counter + n - 1.
__attribute__((visibility("default"))) void fastadapters_philox(uint64_t key, uint64_t offset,
                                                                uint64_t counter, int64_t n,
                                                                uint32_t* out);
}

#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../philox.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastadapters::cpu {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

bool has_amx() {
  if (!has_avx512_bf16()) return false;
#if defined(FASTADAPTERS_EMULATE_AMX)
  return true;
#else
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if ((d & (bf16 | tile)) != (bf16 | tile)) return false;
  // The kernel hands out the tile registers on request, once per process.
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#endif
}
#endif

bool always() { return true; }

// Best first. `kernels` has an entry per dtype; where one is missing the next set has it.
struct Isa {
  const char* name;
  bool (*supported)();
  const BottleneckKernels* kernels[3];
};

const Isa isas[] = {
#if defined(__x86_64__)
    {"amx", has_amx, {nullptr, &amx_kernels, nullptr}},
    {"avx512_bf16", has_avx512_bf16, {nullptr, &avx512_bf16_kernels, nullptr}},
    {"avx512", has_avx512, {&avx512_kernels[0], &avx512_kernels[1], &avx512_kernels[2]}},
    {"avx2", has_avx2, {&avx2_kernels[0], &avx2_kernels[1], &avx2_kernels[2]}},
#endif
    {"portable", always, {&portable_kernels[0], &portable_kernels[1], &portable_kernels[2]}},
};

const Isa* find(const char* name) {
  for (const Isa& isa : isas)
    if ((!name || !std::strcmp(isa.name, name)) && isa.supported()) return &isa;
  return nullptr;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa = [] {
    const char* name = std::getenv("FASTADAPTERS_CPU_ISA");
    return find(name && *name ? name : nullptr);
  }();
  return isa;
}

std::string unsupported() {
  return std::string("FASTADAPTERS_CPU_ISA=") + std::getenv("FASTADAPTERS_CPU_ISA") +
         " is not among the instruction sets of this CPU: " + fastadapters_cpu_isas();
}

const BottleneckKernels& kernels(Dtype dtype) {
  const Isa* isa = current();
  if (!isa) throw std::invalid_argument(unsupported());
  while (!isa->kernels[int(dtype)]) ++isa;
  return *isa->kernels[int(dtype)];
}

}  // namespace

void bottleneck_forward(const BottleneckForward& args, const Threads& threads) {
  kernels(args.dtype).forward(args, threads);
}

void bottleneck_backward(const BottleneckBackward& args, const Threads& threads) {
  kernels(args.dtype).backward(args, threads);
}

}  // namespace fastadapters::cpu

using namespace fastadapters;

const char* fastadapters_cpu_isas() {
  static const std::string names = [] {
    std::string s;
    for (const cpu::Isa& isa : cpu::isas)
      if (isa.supported()) s += (s.empty() ? "" : ",") + std::string(isa.name);
    return s;
  }();
  return names.c_str();
}

const char* fastadapters_cpu_isa() {
  const cpu::Isa* isa = cpu::current();
  static const std::string reason = isa ? "" : cpu::unsupported();
  return isa ? isa->name : reason.c_str();
}

bool fastadapters_set_cpu_isa(const char* name) {
  const cpu::Isa* isa = cpu::find(name);
  if (isa) cpu::current() = isa;
  return isa;
}

void fastadapters_philox(uint64_t key, uint64_t offset, uint64_t counter, int64_t n,
                         uint32_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    PhiloxBlock block = philox4x32(key, counter + uint64_t(i), offset);
    std::memcpy(out + 4 * i, block.lane, sizeof block.lane);
  }
}

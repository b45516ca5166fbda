#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

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
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
bool has_amx() { return false; }
#endif

bool always() { return true; }

struct Entry {
  const char* name;
  bool (*supported)();
};

// In the order of Isa.
const Entry isas[kIsas] = {
    {"amx", has_amx},       {"avx512_bf16", has_avx512_bf16},
    {"avx512", has_avx512}, {"avx2", has_avx2},
    {"portable", always},
};

const Entry* find(const char* name) {
  for (const Entry& isa : isas)
    if ((!name || !std::strcmp(isa.name, name)) && isa.supported()) return &isa;
  return nullptr;
}

std::atomic<const Entry*>& current() {
  static std::atomic<const Entry*> isa = [] {
    const char* name = std::getenv("FASTADAPTERS_CPU_ISA");
    return find(name && *name ? name : nullptr);
  }();
  return isa;
}

std::string unsupported() {
  return std::string("FASTADAPTERS_CPU_ISA=") + std::getenv("FASTADAPTERS_CPU_ISA") +
         " is not among the instruction sets of this CPU: " + fastadapters_cpu_isas();
}

}  // namespace

Isa isa() {
  const Entry* entry = current();
  if (!entry) throw std::invalid_argument(unsupported());
  return Isa(entry - isas);
}

}  // namespace fastadapters::cpu

using namespace fastadapters;

const char* fastadapters_cpu_isas() {
  static const std::string names = [] {
    std::string s;
    for (const cpu::Entry& isa : cpu::isas)
      if (isa.supported()) s += (s.empty() ? "" : ",") + std::string(isa.name);
    return s;
  }();
  return names.c_str();
}

const char* fastadapters_cpu_isa() {
  const cpu::Entry* isa = cpu::current();
  static const std::string reason = isa ? "" : cpu::unsupported();
  return isa ? isa->name : reason.c_str();
}

bool fastadapters_set_cpu_isa(const char* name) {
  const cpu::Entry* isa = cpu::find(name);
  if (isa) cpu::current() = isa;
  return isa;
}

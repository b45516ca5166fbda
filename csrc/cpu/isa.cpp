#include "isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "rates.h"

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

// Tests emulate what a CPU lacks.
#if defined(FASTADAPTERS_EMULATE_AVX512)
bool has_avx512() { return has_avx2(); }
#else
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#if defined(FASTADAPTERS_EMULATE_AVX512_BF16)
bool has_avx512_bf16() { return has_avx512(); }
#else
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

#if defined(FASTADAPTERS_EMULATE_AMX)
bool has_amx() { return has_avx512_bf16(); }
#else
bool has_amx() {
  if (!has_avx512_bf16()) return false;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if ((d & (bf16 | tile)) != (bf16 | tile)) return false;
  // The kernel hands out the tile registers on request, once per process.
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif
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
  bool bfloat16_only;  // the next set that is not has the other dtypes
};

// In the order of Isa.
const Entry isas[kIsas] = {
    {"amx", has_amx, true},        {"avx512_bf16", has_avx512_bf16, true},
    {"avx512", has_avx512, false}, {"avx2", has_avx2, false},
    {"portable", always, false},
};

const Entry* find(const char* name) {
  for (const Entry& isa : isas)
    if ((!name || !std::strcmp(isa.name, name)) && isa.supported()) return &isa;
  return nullptr;
}

const char* requested() {
  const char* name = std::getenv("FASTADAPTERS_CPU_ISA");
  return name && *name ? name : nullptr;
}

// The best one or the one named, by the variable or since.
std::atomic<const Entry*>& current() {
  static std::atomic<const Entry*> isa = find(requested());
  return isa;
}

std::atomic<bool>& named() {
  static std::atomic<bool> named = requested() != nullptr;
  return named;
}

// Whether two instruction sets can do the same here and nobody has said which one is to.
bool measures(Dtype dtype) {
  return dtype == Dtype::bfloat16 && !named() && current() == &isas[int(Isa::avx512_bf16)];
}

// Measured at the first call.
const Choice& measured_bfloat16() {
#if defined(__x86_64__)
  static const Choice choice = choose_bfloat16(avx512_bf16_rate(), avx512_rate());
#else
  static const Choice choice = {Isa::portable, ""};
#endif
  return choice;
}

std::string unsupported() {
  return std::string("FASTADAPTERS_CPU_ISA=") + std::getenv("FASTADAPTERS_CPU_ISA") +
         " is not among the instruction sets of this CPU: " + fastadapters_cpu_isas();
}

}  // namespace

Isa isa(Dtype dtype) {
  const Entry* entry = current();
  if (!entry) throw std::invalid_argument(unsupported());
  if (measures(dtype)) return measured_bfloat16().isa;
  while (dtype != Dtype::bfloat16 && entry->bfloat16_only) ++entry;
  return Isa(entry - isas);
}

Choice choose_bfloat16(double avx512_bf16, double avx512) {
  bool pairs = avx512_bf16 > avx512;
  char rates[100];
  std::snprintf(rates, sizeof rates, "%.0f GFLOP/s in bf16 against %.0f in fp32, measured",
                2e-9 * avx512_bf16, 2e-9 * avx512);
  return {pairs ? Isa::avx512_bf16 : Isa::avx512, rates};
}

const char* name(Isa isa) { return isas[int(isa)].name; }

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

const char* fastadapters_cpu_isa_for(int32_t dtype) {
  static thread_local std::string text;
  if (!cpu::current()) return fastadapters_cpu_isa();
  cpu::Isa isa = cpu::isa(Dtype(dtype));
  bool measured = cpu::measures(Dtype(dtype));
  text = cpu::name(isa);
  text += measured       ? ": " + cpu::measured_bfloat16().reason
          : cpu::named() ? ": by name"
                         : ": the best of this CPU";
  return text.c_str();
}

bool fastadapters_set_cpu_isa(const char* name) {
  const cpu::Entry* isa = cpu::find(name);
  if (!isa) return false;
  cpu::current() = isa;
  cpu::named() = true;
  return true;
}

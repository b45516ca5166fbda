// The emulated instructions of AVX-512 and AVX512-BF16: values worked out by hand from the Intel
// SDM, and, on a CPU that has the instructions, random bits through both. Prints one line per
// failure; exits 1 if there was any.
#include <cstdio>

#if defined(__AVX2__)
#include <random>
#include <vector>

#include "cpu/avx512_emulation.h"

namespace fastadapters::cpu {
namespace {

int failures = 0;

void expect(const char* name, uint32_t got, uint32_t expected) {
  if (got == expected) return;
  ++failures;
  std::printf("%s: expected %08x, got %08x\n", name, expected, got);
}

Words16 all(uint32_t word) { return Words16{} + word; }

// In each lane: c, the pairs of a and b (odd value first), the result.
struct Dot {
  const char* name;
  uint32_t c, a, b, result;
};
constexpr Dot kDots[] = {
    {"1.5 + 2 * 3 + 4 * 5", 0x3fc00000, 0x40004080, 0x404040a0, 0x41dc0000},
    {"the odd product is added first", 0xce800000, 0x47003f80, 0x47003f80, 0x3f800000},
    {"a product is not rounded alone", 0xff000000, 0x5f800000, 0x5f800000, 0x7f000000},
    {"to even: 2^24 + 1", 0x4b800000, 0x3f800000, 0x3f800000, 0x4b800000},
    {"to even: 2^24 + 3", 0x4b800000, 0x40400000, 0x3f800000, 0x4b800002},
    {"subnormal c", 0x807fffff, 0, 0, 0x00000000},
    {"subnormal factor", 0x00000000, 0x007f0000, 0x7f000000, 0x00000000},
    {"subnormal result", 0x00000000, 0x1f800000, 0x1f800000, 0x00000000},
    {"subnormal between", 0x00800000, 0x20002000, 0x9f802000, 0x00800000},
    {"infinity", 0x7f800000, 0x3f800000, 0xc0000000, 0x7f800000},
};

struct Narrowed {
  uint32_t wide, narrow;
};
constexpr Narrowed kNarrowed[] = {
    {0x3f800000, 0x3f80}, {0x3f808000, 0x3f80}, {0x3f818000, 0x3f82}, {0x3f808001, 0x3f81},
    {0xbf817fff, 0xbf81}, {0x007fffff, 0x0000}, {0x80400000, 0x8000}, {0x7f7fffff, 0x7f80},
    {0xff800000, 0xff80}, {0x7f800001, 0x7fc0}, {0xffc12345, 0xffc1},
};

uint32_t dot(uint32_t c, uint32_t a, uint32_t b) {
  return ((Words16)_mm512_dpbf16_ps((__m512)all(c), (__m512bh)all(a), (__m512bh)all(b)))[5];
}

void compare_with_hardware() {
  std::mt19937 generator(1);
  // Exponents close to each other, so that sums are of terms of about one size; then any bits.
  auto draw = [&](bool any) {
    Words16 words;
    for (int i = 0; i < 16; ++i) {
      uint32_t bits = uint32_t(generator());
      words[i] = any ? bits : (bits & 0x83ff83ff) | 0x3c003c00;
    }
    return words;
  };
  for (int round = 0; round < 100000; ++round) {
    Words16 c = draw(round % 2), a = draw(round % 2), b = draw(round % 2), sum;
    Halves16 narrow;
    asm volatile(
        "vmovups %2, %%zmm0\n vmovups %3, %%zmm1\n vdpbf16ps %4, %%zmm1, %%zmm0\n"
        "vmovups %%zmm0, %0\n vcvtneps2bf16 %2, %%ymm0\n vmovups %%ymm0, %1"
        : "=m"(sum), "=m"(narrow)
        : "m"(c), "m"(a), "m"(b)
        : "xmm0", "xmm1");
    Words16 emulated = (Words16)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
    Halves16 rounded = (Halves16)_mm512_cvtneps_pbh((__m512)c);
    for (int i = 0; i < 16; ++i) {
      bool both_nan =
          ((__m512)sum)[i] != ((__m512)sum)[i] && ((__m512)emulated)[i] != ((__m512)emulated)[i];
      if (!both_nan) expect("vdpbf16ps", emulated[i], sum[i]);
      expect("vcvtneps2bf16", rounded[i], narrow[i]);
    }
  }
}

int run() {
  for (const Dot& d : kDots) expect(d.name, dot(d.c, d.a, d.b), d.result);
  for (const Narrowed& n : kNarrowed)
    expect("narrowed", ((Halves16)_mm512_cvtneps_pbh((__m512)all(n.wide)))[11], n.narrow);
  // Lanes stay in their places.
  __m512 squares, values;
  for (int i = 0; i < 16; ++i) squares[i] = float(i * i), values[i] = float(i) - 0.25f;
  __m512 roots = _mm512_maskz_sqrt_ps(-1, squares);
  __m512 back = _mm512_maskz_cvtph_ps(-1, _mm512_maskz_cvtps_ph(-1, values, 0));
  for (int i = 0; i < 16; ++i)
    if (roots[i] != float(i) || back[i] != values[i]) {
      ++failures;
      std::printf("lane %d: %g %g\n", i, roots[i], back[i]);
    }
  // Of a NaN and a number the second one.
  __m512 number = __m512{} + 3, nan = __m512{} + __builtin_nanf("");
  __m512 most = _mm512_maskz_max_ps(-1, values, number);
  __m512 least = _mm512_maskz_min_ps(-1, values, number);
  for (int i = 0; i < 16; ++i)
    if (most[i] != (values[i] > 3 ? values[i] : 3) || least[i] != (values[i] < 3 ? values[i] : 3) ||
        _mm512_maskz_max_ps(-1, nan, number)[i] != 3 ||
        _mm512_maskz_min_ps(-1, nan, number)[i] != 3) {
      ++failures;
      std::printf("lane %d: at most %g, at least %g\n", i, most[i], least[i]);
    }
  // A masked load reads no more than it gives.
  std::vector<float> three = {1, 2, 3};
  __m512 loaded = _mm512_maskz_loadu_ps(0b101, three.data());
  for (int i = 0; i < 16; ++i)
    if (loaded[i] != (i == 0 || i == 2 ? three[size_t(i)] : 0)) {
      ++failures;
      std::printf("masked lane %d: %g\n", i, loaded[i]);
    }
  if (__builtin_cpu_supports("avx512bf16")) compare_with_hardware();
  std::printf("emulated instructions: %d failures\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace fastadapters::cpu

int main() { return fastadapters::cpu::run(); }
#else
int main() { std::puts("emulated instructions: not on this CPU"); }
#endif

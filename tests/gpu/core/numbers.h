// Number formats of the PTX ISA and their rounding.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

enum class Round { nearest, zero, down, up, away };

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Rounds x (an fp64 value, exact) to a binary format with the given number of stored mantissa bits
// and minimum normal exponent; overflow is left to the caller's range.
inline double round_mantissa(double x, int mantissa, int min_exponent, Round mode) {
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent = std::max(std::ilogb(x), min_exponent);
  double unit = std::ldexp(1.0, exponent - mantissa), scaled = x / unit;
  switch (mode) {
    case Round::nearest:
      return std::nearbyint(scaled) * unit;
    case Round::zero:
      return std::trunc(scaled) * unit;
    case Round::down:
      return std::floor(scaled) * unit;
    case Round::up:
      return std::ceil(scaled) * unit;
    case Round::away:
      return std::round(scaled) * unit;
  }
  return x;
}

inline bool rounds_to_infinity(double x, Round mode) {
  return mode == Round::nearest || mode == Round::away || mode == (x > 0 ? Round::up : Round::down);
}

struct Half {
  uint16_t bits;
  Half() = default;
  explicit Half(double x, Round mode = Round::nearest) {
    uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) {
      bits = 0x7fff;
      return;
    }
    double y = std::fabs(round_mantissa(x, 10, -14, mode));
    if (y > 65504.0) {
      bool infinite = std::isinf(x) || rounds_to_infinity(x, mode);
      bits = sign | (infinite ? 0x7c00 : 0x7bff);
    } else if (y < 0x1p-14) {
      bits = sign | uint16_t(y * 0x1p24);
    } else {
      int e = std::ilogb(y);
      bits = sign | uint16_t((e + 15) << 10) | uint16_t((std::ldexp(y, -e) - 1) * 1024);
    }
  }
  explicit Half(float x) {
#ifdef __F16C__
    using Four = float __attribute__((vector_size(16)));
    // _cvtss_sh to the nearest, without the half second that its header takes in every file.
    bits = std::isnan(x) ? 0x7fff : uint16_t(__builtin_ia32_vcvtps2ph(Four{x}, 0)[0]);
#else
    *this = Half(double(x));
#endif
  }
  operator float() const {
    uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
    float magnitude = rest >= 0x7c00 ? bit_cast<float>(0x7f800000u | (rest & 0x3ff) << 13)
                                     : bit_cast<float>(rest << 13) * 0x1p112f;
    return bit_cast<float>(bit_cast<uint32_t>(magnitude) | sign);
  }
};

struct BFloat {
  uint16_t bits;
  BFloat() = default;
  explicit BFloat(float x) {
    uint32_t u = bit_cast<uint32_t>(x);
    bits = (u & 0x7fffffff) > 0x7f800000 ? 0x7fff : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  explicit BFloat(double x, Round mode = Round::nearest) {
    double y = std::isnan(x) ? x : round_mantissa(x, 7, -126, mode);
    constexpr double largest = 0x1.fep127;
    if (std::fabs(y) > largest && std::isfinite(x)) {
      y = std::copysign(
          rounds_to_infinity(x, mode) ? std::numeric_limits<double>::infinity() : largest, x);
    }
    bits = std::isnan(x) ? 0x7fff : uint16_t(bit_cast<uint32_t>(float(y)) >> 16);
  }
  operator float() const { return bit_cast<float>(uint32_t(bits) << 16); }
};

template <class T>
struct Pair {
  T low, high;
};

// The tensor cores read a tf32 operand by ignoring its 13 low bits.
inline float truncate_tf32(uint32_t bits) { return bit_cast<float>(bits & 0xffffe000u); }

inline uint32_t round_tf32(float x, Round mode) {
  if (std::isnan(x)) return 0x7fffffff;
  return bit_cast<uint32_t>(float(round_mantissa(x, 10, -126, mode)));
}

template <class T>
constexpr bool is_small_float = std::is_same_v<T, Half> || std::is_same_v<T, BFloat>;
template <class T>
constexpr bool is_float = std::is_floating_point_v<T> || is_small_float<T>;

// s + e is the exact result, s its nearest double: round it to fp32 in a directed mode.
inline float directed(double s, double e, Round mode) {
  float f = float(s);
  if (mode == Round::nearest || !std::isfinite(s)) return f;
  double difference = double(f) - s;
  bool above = difference > 0 || (difference == 0 && e < 0);
  bool below = difference < 0 || (difference == 0 && e > 0);
  bool toward_down = mode == Round::down || (mode == Round::zero && s > 0);
  bool toward_up = mode == Round::up || (mode == Round::zero && s < 0);
  constexpr float inf = std::numeric_limits<float>::infinity();
  if (toward_down && above) return std::nextafterf(f, -inf);
  if (toward_up && below) return std::nextafterf(f, inf);
  return f;
}

inline float multiply_add(float a, float b, float c, Round mode) {
  if (mode == Round::nearest) return std::fmaf(a, b, c);
  double p = double(a) * b, s = p + c, t = s - p;
  return directed(s, (p - (s - t)) + (c - t), mode);
}

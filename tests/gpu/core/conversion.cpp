// Conversion between types, and of addresses between spaces.
#include "lanes.h"

namespace {

template <class V>
V integral(V v, Round round) {
  switch (round) {
    case Round::nearest:
      return std::nearbyint(v);
    case Round::zero:
      return std::trunc(v);
    case Round::down:
      return std::floor(v);
    default:
      return std::ceil(v);
  }
}

// An integer type, as data: values of every integer type travel as 128 bits.
struct Integer {
  uint32_t bytes;
  bool is_signed;
  __int128 smallest() const { return is_signed ? -((__int128)1 << (8 * bytes - 1)) : 0; }
  __int128 largest() const { return ((__int128)1 << (8 * bytes - is_signed)) - 1; }
  __int128 get(const uint8_t* from) const {
    uint64_t x = 0;
    std::memcpy(&x, from, bytes);
    if (is_signed) return int64_t(x << (64 - 8 * bytes)) >> (64 - 8 * bytes);
    return x;
  }
  template <class V>
  __int128 from_float(V v, Round round) const {
    if (std::isnan(v)) return bytes == 8 ? (is_signed ? smallest() : (__int128)1 << 63) : 0;
    v = integral(v, round);
    if (double(v) >= std::ldexp(1.0, 8 * bytes - is_signed)) return largest();
    if (double(v) <= double(smallest())) return smallest();
    return __int128(v);
  }
};

template <class To>
To from_integer(__int128 x, Round round) {
  if constexpr (std::is_same_v<To, double>) {
    return double(x);
  } else if constexpr (std::is_same_v<To, float>) {
    double v = double(x);
    return directed(v, double(x - __int128(v)), round);
  } else {
    return To(double(x), round);
  }
}

template <class To, class From>
To from_float(From x, Round round) {
  if constexpr (std::is_same_v<To, From>)
    return x;
  else if constexpr (is_small_float<To> && !std::is_same_v<From, double>)
    return round == Round::nearest ? To(float(x)) : To(double(float(x)), round);
  else if constexpr (is_small_float<To>)
    return To(x, round);
  else if constexpr (std::is_same_v<To, float> && std::is_same_v<From, double>)
    return directed(x, 0, round);
  else
    return To(Wide<From>(x));
}

// Registers may be wider than an integer type: the source is truncated, the result extended.
Run convert_integers(const Decoder& d, Integer to_type, Integer from_type) {
  Register to = d.any_write(d.operand(0), to_type.bytes),
           from = d.any_read(d.operand(1), from_type.bytes);
  if (to.bytes < to_type.bytes || from.bytes < from_type.bytes) d.unknown("register size");
  const bool clamp = d.has("sat");
  return [=](Warp& w, Mask m) {
    lanes(m, [&](int l) {
      __int128 x = from_type.get(w.at<uint8_t>(from) + l * from.bytes);
      if (clamp) x = std::min(std::max(x, to_type.smallest()), to_type.largest());
      uint64_t bits = uint64_t(x),
               extended = uint64_t(to_type.get(reinterpret_cast<uint8_t*>(&bits)));
      std::memcpy(w.at<uint8_t>(to) + l * to.bytes, &extended, to.bytes);
    });
  };
}

template <class From>
Run convert_to_integer(const Decoder& d, Integer type) {
  Register to = d.any_write(d.operand(0), type.bytes), from = d.read(1, sizeof(From), d.type(1));
  const Round round = d.rounding(Round::zero);
  return [=](Warp& w, Mask m) {
    lanes(m, [&](int l) {
      uint64_t x = uint64_t(type.from_float(Wide<From>(w.at<From>(from)[l]), round));
      std::memcpy(w.at<uint8_t>(to) + l * to.bytes, &x, to.bytes);
    });
  };
}

template <class To>
Run convert_from_integer(const Decoder& d, Integer type) {
  Register to = d.write(0, sizeof(To)), from = d.any_read(d.operand(1), type.bytes);
  const Round round = d.rounding();
  return [=](Warp& w, Mask m) {
    lanes(m, [&](int l) {
      w.at<To>(to)[l] = from_integer<To>(type.get(w.at<uint8_t>(from) + l * from.bytes), round);
    });
  };
}

template <class To, class From>
Run convert_floats(const Decoder& d) {
  const bool clamp = d.has("sat"), relu = d.has("relu"),
             whole = d.has("rni") || d.has("rzi") || d.has("rmi") || d.has("rpi");
  const Round round = d.rounding();
  if (!clamp && !relu && !whole)
    return unary<To, From>(d, [=](From x) { return from_float<To>(x, round); });
  return unary<To, From>(d, [=](From x) {
    To y = whole ? from_float<To>(From(integral(Wide<From>(x), round)), Round::nearest)
                 : from_float<To>(x, round);
    Wide<To> v = y;
    if (clamp) v = saturate(v);
    if (relu && !(v > 0) && !std::isnan(v)) v = 0;
    return To(v);
  });
}

template <class T>
Run pack(const Decoder& d) {  // cvt.rn.bf16x2.f32 d, a, b: a goes to the upper half
  const Round round = d.rounding();
  const bool relu = d.has("relu");
  if (d.has("satfinite") || d.has("rs")) d.unknown();
  auto one = [=](float x) {
    T y = round == Round::nearest ? T(x) : T(double(x), round);
    return relu && !(float(y) > 0) && !std::isnan(float(y)) ? T(0.0f) : y;
  };
  return binary<Pair<T>, float, float>(d,
                                       [=](float a, float b) { return Pair<T>{one(b), one(a)}; });
}

Run convert(const Decoder& d) {
  const std::string to = d.type(0), from = d.type(1);
  if (to == "bf16x2" && from == "f32") return pack<BFloat>(d);
  if (to == "f16x2" && from == "f32") return pack<Half>(d);
  if (to == "tf32") {
    const Round round = d.rounding();
    const bool relu = d.has("relu");
    if (d.has("satfinite")) d.unknown();
    return unary<uint32_t, float>(
        d, [=](float a) { return relu && !(a > 0) && !std::isnan(a) ? 0 : round_tf32(a, round); });
  }
  auto integer = [](const std::string& type) { return Integer{type_bytes(type), type[0] == 's'}; };
  auto scalar = [&](const std::string& type, auto f) -> Run {
    if (type == "f32") return f(Type<float>{});
    if (type == "f64") return f(Type<double>{});
    if (type == "f16") return f(Type<Half>{});
    if (type == "bf16") return f(Type<BFloat>{});
    d.unknown("type " + type);
  };
  if (!is_float_type(to) && !is_float_type(from))
    return convert_integers(d, integer(to), integer(from));
  if (!is_float_type(to))
    return scalar(from, [&](auto f) {
      return convert_to_integer<typename decltype(f)::type>(d, integer(to));
    });
  return scalar(to, [&](auto t) {
    using To = typename decltype(t)::type;
    if (!is_float_type(from)) return convert_from_integer<To>(d, integer(from));
    return scalar(from, [&](auto f) { return convert_floats<To, typename decltype(f)::type>(d); });
  });
}

Run convert_address(const Decoder& d) {
  uint64_t window = d.has("shared")  ? shared_window
                    : d.has("local") ? local_window
                    : d.has("param") ? param_window
                                     : 0;
  const bool to_space = d.has("to");
  if (d.type() == "u32") d.unknown("32-bit addresses");
  return unary<uint64_t, uint64_t>(d,
                                   [=](uint64_t a) { return to_space ? a - window : a + window; });
}

}  // namespace

Run compile_conversion(const Decoder& d) {
  if (d.types.empty()) return {};
  if (d.parts[0] == "cvt") return convert(d);
  if (d.parts[0] == "cvta") return convert_address(d);
  return {};
}

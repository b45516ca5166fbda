// Integer arithmetic.
#include "lanes.h"

namespace {

template <class T>
using Product =
    std::conditional_t<sizeof(T) == 8,
                       std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                       std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
template <class T>
using Double =
    std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                       std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;

// add.cc, addc, sub.cc, subc, mad.lo.cc, madc.hi ...: the carry is a hidden predicate.
template <class T>
Run with_carry(const Decoder& d) {
  using U = std::make_unsigned_t<T>;
  const std::string& name = d.parts[0];
  const bool takes = name.back() == 'c', gives = d.has("cc"),
             subtracts = name.compare(0, 3, "sub") == 0;
  const bool multiplies = name.compare(0, 3, "mad") == 0, high = d.has("hi");
  Register to = d.write(0, sizeof(T)), a = d.read(1, sizeof(T)), b = d.read(2, sizeof(T)),
           carry = d.any_read("%carry", 1);
  Register c = multiplies ? d.read(3, sizeof(T)) : b;
  return [=](Warp& w, Mask m) {
    lanes(m, [&](int l) {
      U x = w.at<U>(a)[l], y = w.at<U>(b)[l];
      if (multiplies) {
        Product<T> p = Product<T>(w.at<T>(a)[l]) * w.at<T>(b)[l];
        x = high ? U(p >> (8 * sizeof(T))) : U(p);
        y = w.at<U>(c)[l];
      }
      uint8_t in = takes ? w.at<uint8_t>(carry)[l] : 0;
      unsigned __int128 sum =
          subtracts ? (unsigned __int128)x - y - in : (unsigned __int128)x + y + in;
      w.at<U>(to)[l] = U(sum);
      if (gives) w.at<uint8_t>(carry)[l] = uint8_t(sum >> (8 * sizeof(T))) & 1;
    });
  };
}

template <class T>
Run multiply(const Decoder& d) {
  const bool adds = d.parts[0] == "mad";
  if (d.has("wide")) {
    using W = Double<T>;
    if (adds)
      return ternary<W, T, T, W>(d, [](T a, T b, W c) {
        return W(std::make_unsigned_t<W>(W(a) * W(b)) + std::make_unsigned_t<W>(c));
      });
    return binary<W, T, T>(d, [](T a, T b) { return W(a) * W(b); });
  }
  using U = std::make_unsigned_t<T>;
  if (d.has("hi")) {
    auto high = [](T a, T b) { return T(Product<T>(a) * b >> (8 * sizeof(T))); };
    if (adds) return ternary<T, T, T, T>(d, [=](T a, T b, T c) { return T(U(high(a, b)) + U(c)); });
    return binary<T, T, T>(d, high);
  }
  if (!d.has("lo")) d.unknown();
  if (adds)
    return ternary<T, T, T, T>(
        d, [](T a, T b, T c) { return T(uint64_t(a) * uint64_t(b) + uint64_t(c)); });
  return binary<T, T, T>(d, [](T a, T b) { return T(uint64_t(a) * uint64_t(b)); });
}

template <class T>
Run integer_arithmetic(const Decoder& d) {
  using U = std::make_unsigned_t<T>;
  const std::string& name = d.parts[0];
  if (d.has("cc") || name == "addc" || name == "subc" || name == "madc") return with_carry<T>(d);
  const bool clamp = d.has("sat");
  if (name == "add" || name == "sub") {
    const bool subtracts = name == "sub";
    if (clamp) {
      return binary<T, T, T>(d, [=](T a, T b) {
        int64_t x = subtracts ? int64_t(a) - b : int64_t(a) + b;
        return T(std::min<int64_t>(std::max<int64_t>(x, std::numeric_limits<T>::min()),
                                   std::numeric_limits<T>::max()));
      });
    }
    if (subtracts) return binary<T, T, T>(d, [](T a, T b) { return T(U(a) - U(b)); });
    return binary<T, T, T>(d, [](T a, T b) { return T(U(a) + U(b)); });
  }
  if (name == "mul" || name == "mad") return multiply<T>(d);
  if (name == "div") {
    return binary<T, T, T>(d, [](T a, T b) -> T {
      if (b == 0) return T(-1);
      return std::is_signed_v<T> && b == T(-1) ? T(U(0) - U(a)) : T(a / b);
    });
  }
  if (name == "rem") {
    return binary<T, T, T>(d, [](T a, T b) -> T {
      if (b == 0) return a;
      return std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
    });
  }
  if (name == "min") return binary<T, T, T>(d, [](T a, T b) { return std::min(a, b); });
  if (name == "max") return binary<T, T, T>(d, [](T a, T b) { return std::max(a, b); });
  if (name == "abs") return unary<T, T>(d, [](T a) { return a < 0 ? T(U(0) - U(a)) : a; });
  if (name == "neg") return unary<T, T>(d, [](T a) { return T(U(0) - U(a)); });
  if (name == "sad")
    return ternary<T, T, T, T>(
        d, [](T a, T b, T c) { return T(U(c) + (a < b ? U(b) - U(a) : U(a) - U(b))); });
  return {};
}

}  // namespace

Run compile_integers(const Decoder& d) {
  static const std::set<std::string> own = {"add", "sub", "mul", "mad", "div",  "rem",  "min",
                                            "max", "abs", "neg", "sad", "addc", "subc", "madc"};
  if (d.types.empty() || is_float_type(d.types.back()) || !own.count(d.parts[0])) return {};
  return with_integer(d, d.type(),
                      [&](auto t) { return integer_arithmetic<typename decltype(t)::type>(d); });
}

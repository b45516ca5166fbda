// Floating-point arithmetic: computed in float or double, and rounded to the type.
#include "lanes.h"

namespace {

template <class F, class... T>
auto apply(F f, T... x) {
  using U = std::common_type_t<T...>;
  return U(f(Wide<U>(x)...));
}
template <class F, class... T>
Pair<std::common_type_t<T...>> apply(F f, Pair<T>... x) {
  return {apply(f, x.low...), apply(f, x.high...)};
}

template <class F>
Run float_unary(const Decoder& d, F f) {
  return with_float(d, d.types.back(), [&](auto t) {
    using T = typename decltype(t)::type;
    return unary<T, T>(d, [=](T a) { return apply(f, a); });
  });
}

template <class F>
Run float_binary(const Decoder& d, F f) {
  return with_float(d, d.types.back(), [&](auto t) {
    using T = typename decltype(t)::type;
    return binary<T, T, T>(d, [=](T a, T b) { return apply(f, a, b); });
  });
}

// a * b + c with the instruction's rounding and clamping; add, sub and mul are special cases.
Run multiply_add_family(const Decoder& d) {
  const std::string name = d.parts[0], type = d.types.back();
  const Round round = d.rounding();
  const bool clamp = d.has("sat"), relu = d.has("relu");
  auto make = [&](auto compute) -> Run {
    auto finish = [=](auto x) {
      if (clamp) x = saturate(x);
      if (relu) x = x > 0 || std::isnan(x) ? x : 0;
      return x;
    };
    return compute(finish);
  };
  if (type == "f32" && (round != Round::nearest || clamp)) {
    return make([&](auto finish) -> Run {
      if (name == "fma" || name == "mad") {
        return ternary<float, float, float, float>(
            d, [=](float a, float b, float c) { return finish(multiply_add(a, b, c, round)); });
      }
      if (name == "mul") {
        return binary<float, float, float>(
            d, [=](float a, float b) { return finish(directed(double(a) * b, 0, round)); });
      }
      float sign = name == "sub" ? -1 : 1;
      return binary<float, float, float>(
          d, [=](float a, float b) { return finish(multiply_add(sign, b, a, round)); });
    });
  }
  if (round != Round::nearest) d.unknown("rounding");
  if (name == "fma" || name == "mad") {
    return with_float(d, type, [&](auto t) -> Run {
      using T = typename decltype(t)::type;
      using C = typename Component<T>::type;
      auto one = [=](C a, C b, C c) -> C {
        if constexpr (is_small_float<C>) {
          double x = double(float(a)) * float(b) +
                     float(c);  // exact product; one rounding to 53 bits first
          return relu && !(x > 0) && !std::isnan(x) ? C(0.0f) : C(x);
        } else {
          return std::fma(a, b, c);
        }
      };
      return ternary<T, T, T, T>(d, [=](T a, T b, T c) {
        if constexpr (std::is_same_v<T, C>)
          return one(a, b, c);
        else
          return T{one(a.low, b.low, c.low), one(a.high, b.high, c.high)};
      });
    });
  }
  if (clamp || relu) d.unknown("clamping");
  if (name == "add") return float_binary(d, [](auto a, auto b) { return a + b; });
  if (name == "sub") return float_binary(d, [](auto a, auto b) { return a - b; });
  return float_binary(d, [](auto a, auto b) { return a * b; });
}

template <class V>
V minimum(V a, V b) {
  if (std::isnan(a)) return b;
  if (std::isnan(b)) return a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}

Run float_arithmetic(const Decoder& d) {
  const std::string& name = d.parts[0];
  if (name == "add" || name == "sub" || name == "mul" || name == "fma" || name == "mad")
    return multiply_add_family(d);
  if (name == "min" || name == "max") {
    const bool keep_nan = d.has("NaN"), maximum = name == "max";
    if (d.has("xorsign") || d.operands() != 3) d.unknown();
    return float_binary(d, [=](auto a, auto b) {
      using V = decltype(a);
      if (keep_nan && (std::isnan(a) || std::isnan(b))) return std::numeric_limits<V>::quiet_NaN();
      return maximum ? -minimum<V>(-a, -b) : minimum<V>(a, b);
    });
  }
  if (name == "neg") return float_unary(d, [](auto a) { return -a; });
  if (name == "abs") return float_unary(d, [](auto a) { return std::fabs(a); });
  if (name == "copysign")
    return float_binary(d, [](auto a, auto b) { return std::copysign(b, a); });
  if (d.rounding() != Round::nearest) d.unknown("rounding");
  if (name == "div") return float_binary(d, [](auto a, auto b) { return a / b; });
  if (name == "rcp") return float_unary(d, [](auto a) { return 1 / a; });
  if (name == "sqrt") return float_unary(d, [](auto a) { return std::sqrt(a); });
  if (name == "rsqrt")
    return float_unary(d, [](auto a) { return decltype(a)(1 / std::sqrt(double(a))); });
  if (name == "ex2") return float_unary(d, [](auto a) { return std::exp2(a); });
  if (name == "lg2") return float_unary(d, [](auto a) { return std::log2(a); });
  if (name == "sin") return float_unary(d, [](auto a) { return std::sin(a); });
  if (name == "cos") return float_unary(d, [](auto a) { return std::cos(a); });
  if (name == "tanh") return float_unary(d, [](auto a) { return std::tanh(a); });
  return {};
}

}  // namespace

Run compile_floats(const Decoder& d) {
  static const std::set<std::string> own = {"add", "sub", "mul", "mad",  "fma",     "div",   "min",
                                            "max", "abs", "neg", "rcp",  "sqrt",    "rsqrt", "ex2",
                                            "lg2", "sin", "cos", "tanh", "copysign"};
  if (d.types.empty() || !is_float_type(d.types.back()) || !own.count(d.parts[0])) return {};
  return float_arithmetic(d);
}

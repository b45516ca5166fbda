// Comparison, tests and selection.
#include "lanes.h"

namespace {

enum class Test { eq, ne, lt, le, gt, ge, equ, neu, ltu, leu, gtu, geu, num, nan };

template <class V>
bool holds(Test test, V a, V b) {
  bool unordered = false;
  if constexpr (std::is_floating_point_v<V>) unordered = std::isnan(a) || std::isnan(b);
  switch (test) {
    case Test::eq:
      return a == b;
    case Test::ne:
      return !unordered && a != b;
    case Test::lt:
      return a < b;
    case Test::le:
      return a <= b;
    case Test::gt:
      return a > b;
    case Test::ge:
      return a >= b;
    case Test::equ:
      return unordered || a == b;
    case Test::neu:
      return unordered || a != b;
    case Test::ltu:
      return unordered || a < b;
    case Test::leu:
      return unordered || a <= b;
    case Test::gtu:
      return unordered || a > b;
    case Test::geu:
      return unordered || a >= b;
    case Test::num:
      return !unordered;
    case Test::nan:
      return unordered;
  }
  return false;
}

Test parse_test(const Decoder& d) {
  static const std::map<std::string, Test> names = {
      {"eq", Test::eq},   {"ne", Test::ne},   {"lt", Test::lt},   {"le", Test::le},
      {"gt", Test::gt},   {"ge", Test::ge},   {"lo", Test::lt},   {"ls", Test::le},
      {"hi", Test::gt},   {"hs", Test::ge},   {"equ", Test::equ}, {"neu", Test::neu},
      {"ltu", Test::ltu}, {"leu", Test::leu}, {"gtu", Test::gtu}, {"geu", Test::geu},
      {"num", Test::num}, {"nan", Test::nan}};
  auto found = names.find(d.parts.at(1));
  if (found == names.end()) d.unknown("comparison");
  return found->second;
}

template <class T>
Run comparison(const Decoder& d) {
  using C = typename Component<T>::type;
  constexpr bool paired = !std::is_same_v<C, T>;
  const Test test = parse_test(d);
  const bool sets = d.parts[0] == "set";
  std::vector<std::string> results = split(d.operand(0), '|');
  const std::string type = d.types.back(), to_type = sets ? d.types.front() : "pred";
  Register to = d.write(results[0], sets ? type_bytes(to_type) : 1), a = d.read(1, sizeof(T), type),
           b = d.read(2, sizeof(T), type);
  Register second = results.size() > 1 ? d.write(results[1], 1) : Register{};
  bool negated = false;
  Register other{};
  if (d.operands() > 3) {
    negated = d.operand(3)[0] == '!';
    other = d.read(d.operand(3).substr(negated), 1);
  }
  const int with = d.has("and") ? 1 : d.has("or") ? 2 : d.has("xor") ? 3 : 0;
  if ((with != 0) != (d.operands() > 3)) d.unknown("boolean operator");
  auto combine = [=](Warp& w, int l, bool r) {
    if (!with) return r;
    bool o = (w.at<uint8_t>(other)[l] ^ negated) & 1;
    return with == 1 ? r && o : with == 2 ? r || o : r != o;
  };
  if (sets) {
    const bool floating = to_type == "f32";
    if constexpr (paired) {
      const bool full = to_type == "f16x2" || to_type == "bf16x2";
      if (full) d.unknown("destination type");
      return [=](Warp& w, Mask m) {
        lanes(m, [&](int l) {
          T x = w.at<T>(a)[l], y = w.at<T>(b)[l];
          bool low = combine(w, l, holds(test, float(x.low), float(y.low))),
               high = combine(w, l, holds(test, float(x.high), float(y.high)));
          w.at<uint32_t>(to)[l] = (low ? 0xffffu : 0) | (high ? 0xffff0000u : 0);
        });
      };
    } else {
      return [=](Warp& w, Mask m) {
        lanes(m, [&](int l) {
          bool r;
          if constexpr (is_float<T>)
            r = holds(test, Wide<T>(w.at<T>(a)[l]), Wide<T>(w.at<T>(b)[l]));
          else
            r = holds(test, w.at<T>(a)[l], w.at<T>(b)[l]);
          r = combine(w, l, r);
          if (to.bytes == 4)
            w.at<uint32_t>(to)[l] = !r ? 0 : floating ? 0x3f800000u : ~0u;
          else
            w.at<uint16_t>(to)[l] = !r ? 0 : 0xffff;
        });
      };
    }
  }
  return [=](Warp& w, Mask m) {
    const T *x = w.at<T>(a), *y = w.at<T>(b);
    lanes(m, [&](int l) {
      bool r, complement;
      if constexpr (paired) {  // p for the low halves, q for the high ones
        r = holds(test, float(x[l].low), float(y[l].low));
        complement = combine(w, l, holds(test, float(x[l].high), float(y[l].high)));
      } else {
        if constexpr (is_float<T>)
          r = holds(test, Wide<T>(x[l]), Wide<T>(y[l]));
        else
          r = holds(test, x[l], y[l]);
        complement = combine(w, l, !r);
      }
      w.at<uint8_t>(to)[l] = combine(w, l, r);
      if (second.bytes) w.at<uint8_t>(second)[l] = complement;
    });
  };
}

Run select(const Decoder& d) {
  uint32_t bytes = type_bytes(d.type());
  return with_bits(d, bytes, [&](auto t) -> Run {
    using T = typename decltype(t)::type;
    Register to = d.write(0, bytes), a = d.read(1, bytes, d.type()), b = d.read(2, bytes, d.type()),
             p = d.read(3, 1);
    return [=](Warp& w, Mask m) {
      T* out = w.at<T>(to);
      const T *x = w.at<T>(a), *y = w.at<T>(b);
      const uint8_t* c = w.at<uint8_t>(p);
      lanes(m, [&](int l) { out[l] = c[l] & 1 ? x[l] : y[l]; });
    };
  });
}

Run test_property(const Decoder& d) {
  const bool infinite = d.has("infinite"), finite = d.has("finite"), number = d.has("number"),
             normal = d.has("normal"), subnormal = d.has("subnormal");
  return with_float(d, d.type(), [&](auto t) -> Run {
    using T = typename decltype(t)::type;
    if constexpr (!std::is_floating_point_v<T>)
      d.unknown();
    else
      return unary<uint8_t, T>(d, [=](T a) -> uint8_t {
        if (infinite) return std::isinf(a);
        if (finite) return std::isfinite(a);
        if (number) return !std::isnan(a);
        if (normal) return std::isnormal(a) || a == 0;
        if (subnormal) return std::fpclassify(a) == FP_SUBNORMAL;
        return std::isnan(a);
      });
  });
}

}  // namespace

Run compile_comparison(const Decoder& d) {
  const std::string& name = d.parts[0];
  if (d.types.empty()) return {};
  if (name == "selp") return select(d);
  if (name == "testp") return test_property(d);
  if (name == "setp" || name == "set") {
    const std::string type = d.types.back();
    if (is_float_type(type))
      return with_float(d, type, [&](auto t) { return comparison<typename decltype(t)::type>(d); });
    return with_integer(d, type, [&](auto t) { return comparison<typename decltype(t)::type>(d); });
  }
  return {};
}

// Integer, floating point, comparison, logic, conversion and move instructions.
#include <algorithm>

#include "compiler.h"

namespace {

template <class T>
struct Type {
  using type = T;
};

template <class F>
Run with_integer(const Decoder& d, const std::string& type, F f) {
  if (type == "s32") return f(Type<int32_t>{});
  if (type == "u32" || type == "b32") return f(Type<uint32_t>{});
  if (type == "s64") return f(Type<int64_t>{});
  if (type == "u64" || type == "b64") return f(Type<uint64_t>{});
  if (type == "s16") return f(Type<int16_t>{});
  if (type == "u16" || type == "b16") return f(Type<uint16_t>{});
  d.unknown("integer type " + type);
}

template <class F>
Run with_bits(const Decoder& d, uint32_t bytes, F f) {
  if (bytes == 4) return f(Type<uint32_t>{});
  if (bytes == 8) return f(Type<uint64_t>{});
  if (bytes == 2) return f(Type<uint16_t>{});
  d.unknown("size");
}

template <class F>
Run with_float(const Decoder& d, const std::string& type, F f) {
  if (type == "f32") return f(Type<float>{});
  if (type == "f64") return f(Type<double>{});
  if (type == "f16") return f(Type<Half>{});
  if (type == "bf16") return f(Type<BFloat>{});
  if (type == "f16x2") return f(Type<Pair<Half>>{});
  if (type == "bf16x2") return f(Type<Pair<BFloat>>{});
  d.unknown("floating point type " + type);
}

bool is_float_type(const std::string& type) {
  return type[0] == 'f' || type.compare(0, 2, "bf") == 0;
}

template <class To, class A, class F>
Run unary(const Decoder& d, F f) {
  Register to = d.write(0, sizeof(To)), a = d.read(1, sizeof(A), d.types.back());
  return [=](Warp& w, Mask m) {
    To* out = w.at<To>(to);
    const A* x = w.at<A>(a);
    lanes(m, [&](int l) { out[l] = f(x[l]); });
  };
}

template <class To, class A, class B, class F>
Run binary(const Decoder& d, F f) {
  Register to = d.write(0, sizeof(To)), a = d.read(1, sizeof(A), d.types.back()),
           b = d.read(2, sizeof(B), d.types.back());
  return [=](Warp& w, Mask m) {
    To* out = w.at<To>(to);
    const A* x = w.at<A>(a);
    const B* y = w.at<B>(b);
    lanes(m, [&](int l) { out[l] = f(x[l], y[l]); });
  };
}

template <class To, class A, class B, class C, class F>
Run ternary(const Decoder& d, F f) {
  Register to = d.write(0, sizeof(To)), a = d.read(1, sizeof(A), d.types.back()),
           b = d.read(2, sizeof(B), d.types.back()), c = d.read(3, sizeof(C), d.types.back());
  return [=](Warp& w, Mask m) {
    To* out = w.at<To>(to);
    const A* x = w.at<A>(a);
    const B* y = w.at<B>(b);
    const C* z = w.at<C>(c);
    lanes(m, [&](int l) { out[l] = f(x[l], y[l], z[l]); });
  };
}

// ---- floating point: f computes in float or double; the result is rounded to the type

template <class T>
struct Component {
  using type = T;
};
template <class T>
struct Component<Pair<T>> {
  using type = T;
};
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

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

template <class V>
V saturate(V x) {
  return x > 0 ? std::min<V>(x, 1) : V(0);
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

// ---- integers

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

uint64_t reverse_bits(uint64_t x, int bits) {
  uint64_t r = 0;
  for (int i = 0; i < bits; ++i) r |= (x >> i & 1) << (bits - 1 - i);
  return r;
}

template <class T>
Run bit_field(const Decoder& d) {
  constexpr int bits = 8 * sizeof(T);
  using U = std::make_unsigned_t<T>;
  return ternary<T, T, uint32_t, uint32_t>(d, [](T a, uint32_t position, uint32_t length) -> T {
    int start = position & 255, n = length & 255;
    T sign = 0;
    if (std::is_signed_v<T> && n) sign = T(a >> std::min(start + n - 1, bits - 1)) & 1;
    if (start >= bits || n == 0) return T(-sign);
    U field = U(a) >> start;
    if (n < bits) {
      U keep = (U(1) << n) - 1;
      field &= keep;
      if (sign)
        field |= ~keep;
      else if (!std::is_signed_v<T>)
        field &= keep;
    }
    if (std::is_signed_v<T> && sign && start && start + n > bits) field |= ~(U(-1) >> start);
    return T(field);
  });
}

template <class T>
Run bit_insert(const Decoder& d) {
  Register to = d.write(0, sizeof(T)), a = d.read(1, sizeof(T)), b = d.read(2, sizeof(T)),
           position = d.read(3, 4), length = d.read(4, 4);
  return [=](Warp& w, Mask m) {
    lanes(m, [&](int l) {
      T value = w.at<T>(b)[l];
      uint32_t start = w.at<uint32_t>(position)[l] & 255, n = w.at<uint32_t>(length)[l] & 255;
      for (uint32_t i = 0; i < n && start + i < 8 * sizeof(T); ++i) {
        T bit = T(1) << (start + i);
        value = (w.at<T>(a)[l] >> i & 1) ? value | bit : value & ~bit;
      }
      w.at<T>(to)[l] = value;
    });
  };
}

Run permute_bytes(const Decoder& d) {
  if (!d.types.empty() && d.parts.size() > 2) d.unknown("mode");
  return ternary<uint32_t, uint32_t, uint32_t, uint32_t>(
      d, [](uint32_t a, uint32_t b, uint32_t selector) {
        uint64_t bytes = uint64_t(b) << 32 | a;
        uint32_t out = 0;
        for (int i = 0; i < 4; ++i) {
          uint32_t s = selector >> 4 * i & 15;
          uint32_t byte = uint32_t(bytes >> 8 * (s & 7)) & 255;
          if (s & 8) byte = byte & 128 ? 255 : 0;
          out |= byte << 8 * i;
        }
        return out;
      });
}

Run logic3(const Decoder& d) {
  const uint32_t table = uint32_t(d.immediate(4));
  return ternary<uint32_t, uint32_t, uint32_t, uint32_t>(
      d, [=](uint32_t a, uint32_t b, uint32_t c) {
        uint32_t r = 0;
        for (int i = 0; i < 8; ++i) {
          if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
        }
        return r;
      });
}

Run predicate_logic(const Decoder& d) {
  const std::string& name = d.parts[0];
  auto operand = [&](size_t i, bool& negated) {
    negated = d.operand(i)[0] == '!';
    return d.read(d.operand(i).substr(negated), 1);
  };
  bool na = false, nb = false;
  Register to = d.write(0, 1), a = operand(1, na), b = a;
  if (d.operands() > 2) b = operand(2, nb);
  int op = name == "and" ? 0 : name == "or" ? 1 : name == "xor" ? 2 : name == "not" ? 3 : 4;
  return [=](Warp& w, Mask m) {
    lanes(m, [&](int l) {
      uint8_t x = (w.at<uint8_t>(a)[l] ^ na) & 1, y = (w.at<uint8_t>(b)[l] ^ nb) & 1;
      w.at<uint8_t>(to)[l] = op == 0   ? x & y
                             : op == 1 ? x | y
                             : op == 2 ? x ^ y
                             : op == 3 ? x ^ 1
                                       : x;
    });
  };
}

template <class T>
Run logic(const Decoder& d) {
  const std::string& name = d.parts[0];
  if (name == "and") return binary<T, T, T>(d, [](T a, T b) { return T(a & b); });
  if (name == "or") return binary<T, T, T>(d, [](T a, T b) { return T(a | b); });
  if (name == "xor") return binary<T, T, T>(d, [](T a, T b) { return T(a ^ b); });
  if (name == "not") return unary<T, T>(d, [](T a) { return T(~a); });
  if (name == "cnot") return unary<T, T>(d, [](T a) { return T(a == 0); });
  return {};
}

Run bits(const Decoder& d) {
  const std::string &name = d.parts[0], type = d.type();
  if (name == "and" || name == "or" || name == "xor" || name == "not" || name == "cnot") {
    if (type == "pred") return predicate_logic(d);
    return with_bits(d, type_bytes(type),
                     [&](auto t) { return logic<typename decltype(t)::type>(d); });
  }
  if (name == "shl") {
    return with_bits(d, type_bytes(type), [&](auto t) {
      using T = typename decltype(t)::type;
      return binary<T, T, uint32_t>(
          d, [](T a, uint32_t n) { return n < 8 * sizeof(T) ? T(a << n) : T(0); });
    });
  }
  if (name == "shr") {
    return with_integer(d, type, [&](auto t) {
      using T = typename decltype(t)::type;
      return binary<T, T, uint32_t>(d, [](T a, uint32_t n) -> T {
        if (n < 8 * sizeof(T)) return T(a >> n);
        return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
      });
    });
  }
  if (name == "shf") {
    const bool left = d.has("l"), wrap = d.has("wrap");
    return ternary<uint32_t, uint32_t, uint32_t, uint32_t>(
        d, [=](uint32_t a, uint32_t b, uint32_t c) {
          uint32_t n = wrap ? c & 31 : std::min(c, 32u);
          uint64_t both = uint64_t(b) << 32 | a;
          return left ? uint32_t(both << n >> 32) : uint32_t(both >> n);
        });
  }
  if (name == "lop3") return logic3(d);
  if (name == "prmt") return permute_bytes(d);
  if (name == "bfe")
    return with_integer(d, type, [&](auto t) { return bit_field<typename decltype(t)::type>(d); });
  if (name == "bfi")
    return with_bits(d, type_bytes(type),
                     [&](auto t) { return bit_insert<typename decltype(t)::type>(d); });
  if (name == "brev" || name == "popc" || name == "clz" || name == "bfind") {
    return with_integer(d, type, [&](auto t) -> Run {
      using T = typename decltype(t)::type;
      using U = std::make_unsigned_t<T>;
      constexpr int n = 8 * sizeof(T);
      if (name == "brev") return unary<T, T>(d, [](T a) { return T(reverse_bits(U(a), n)); });
      if (name == "popc")
        return unary<uint32_t, T>(d, [](T a) { return uint32_t(__builtin_popcountll(U(a))); });
      auto leading = [](U a) { return a ? uint32_t(__builtin_clzll(a) - (64 - n)) : uint32_t(n); };
      if (name == "clz") return unary<uint32_t, T>(d, [=](T a) { return leading(U(a)); });
      const bool shift = d.has("shiftamt");
      return unary<uint32_t, T>(d, [=](T a) {
        U x = std::is_signed_v<T> && a < 0 ? U(~a) : U(a);
        if (!x) return ~0u;
        return shift ? leading(x) : n - 1 - leading(x);
      });
    });
  }
  return {};
}

// ---- comparison and selection

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

// ---- moves

Run move(const Decoder& d) {
  if (d.type() == "pred") return predicate_logic(d);
  uint32_t bytes = type_bytes(d.type());
  std::vector<std::string> to = d.elements(0), from = d.elements(1);
  if (to.size() == 1 && from.size() == 1 && bytes != 16) {
    return with_bits(d, bytes, [&](auto t) {
      using T = typename decltype(t)::type;
      return unary<T, T>(d, [](T a) { return a; });
    });
  }
  // Concatenation: the first element is the least significant.
  std::vector<Register> outs, ins;
  for (const std::string& name : to) outs.push_back(d.write(name, bytes / to.size()));
  for (const std::string& name : from) ins.push_back(d.read(name, bytes / from.size()));
  return [=](Warp& w, Mask m) {
    lanes(m, [&](int l) {
      uint8_t buffer[16];
      uint32_t at = 0;
      for (Register r : ins)
        std::memcpy(buffer + at, w.at<uint8_t>(r) + l * r.bytes, r.bytes), at += r.bytes;
      at = 0;
      for (Register r : outs)
        std::memcpy(w.at<uint8_t>(r) + l * r.bytes, buffer + at, r.bytes), at += r.bytes;
    });
  };
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

// ---- conversion

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

}  // namespace

Run compile_arithmetic(const Decoder& d) {
  const std::string& name = d.parts[0];
  if (d.types.empty()) return {};
  if (name == "cvt") return convert(d);
  if (name == "cvta") return convert_address(d);
  if (name == "mov") return move(d);
  if (name == "selp") return select(d);
  if (name == "setp" || name == "set") {
    const std::string type = d.types.back();
    if (is_float_type(type))
      return with_float(d, type, [&](auto t) { return comparison<typename decltype(t)::type>(d); });
    return with_integer(d, type, [&](auto t) { return comparison<typename decltype(t)::type>(d); });
  }
  if (name == "testp") {
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
  if (Run run = bits(d)) return run;
  static const std::set<std::string> arithmetic = {
      "add",  "sub",   "mul", "mad", "fma",  "div",  "rem",  "min",
      "max",  "abs",   "neg", "sad", "addc", "subc", "madc", "rcp",
      "sqrt", "rsqrt", "ex2", "lg2", "sin",  "cos",  "tanh", "copysign"};
  if (!arithmetic.count(name)) return {};
  if (is_float_type(d.types.back())) return float_arithmetic(d);
  return with_integer(d, d.type(),
                      [&](auto t) { return integer_arithmetic<typename decltype(t)::type>(d); });
}

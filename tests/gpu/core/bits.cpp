// Moves, logic, shifts and bit fields.
#include "lanes.h"

namespace {

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

}  // namespace

Run compile_bits(const Decoder& d) {
  if (d.types.empty()) return {};
  return d.parts[0] == "mov" ? move(d) : bits(d);
}

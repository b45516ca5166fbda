// Loads, stores and atomics.
#include "access.h"

namespace {

bool is_signed_type(const std::string& type) { return type[0] == 's'; }

uint32_t vector_length(const Decoder& d) {
  return d.has("v2") ? 2 : d.has("v4") ? 4 : d.has("v8") ? 8 : 1;
}

Run load(const Decoder& d) {
  const std::string type = d.types.back();
  const uint32_t bytes = type_bytes(type), n = vector_length(d);
  std::vector<Register> to;
  for (const std::string& name : d.elements(0)) to.push_back(d.any_write(name, bytes));
  if (to.size() != n) d.unknown("vector length");
  for (Register r : to) {
    if (r.bytes < bytes) d.unknown("register size");
  }
  const Target target = target_of(d, 1);
  const bool extend = is_signed_type(type);
  const bool acquires = d.has("acquire");
  return [=](Warp& w, Mask m) {
    Access a(w, m, target, bytes * n, Use::read);
    if (acquires && a.space == Space::global) Heap::instance().fence();
    lanes(m, [&](int l) {
      for (uint32_t i = 0; i < n; ++i) {
        uint8_t* out = w.at<uint8_t>(to[i]) + l * to[i].bytes;
        const uint8_t* in = a.at[l] + i * bytes;
        std::memcpy(out, in, bytes);
        if (to[i].bytes > bytes)
          std::memset(out + bytes, extend && in[bytes - 1] & 128 ? 255 : 0, to[i].bytes - bytes);
      }
    });
  };
}

Run store(const Decoder& d) {
  const std::string type = d.types.back();
  const uint32_t bytes = type_bytes(type), n = vector_length(d);
  std::vector<Register> from;
  for (const std::string& name : d.elements(1)) from.push_back(d.any_read(name, bytes, type));
  if (from.size() != n) d.unknown("vector length");
  for (Register r : from) {
    if (r.bytes < bytes) d.unknown("register size");
  }
  const Target target = target_of(d, 0);
  if (d.has("release")) d.unknown("use a fence");
  return [=](Warp& w, Mask m) {
    uint8_t values[32 * 64];
    lanes(m, [&](int l) {
      for (uint32_t i = 0; i < n; ++i)
        std::memcpy(values + (l * n + i) * bytes, w.at<uint8_t>(from[i]) + l * from[i].bytes,
                    bytes);
    });
    Access a(w, m, target, bytes * n, Use::write, values);
    for (Mask rest = m; rest;
         rest &= rest - 1) {  // in lane order: the last of two lanes on one address wins
      int l = __builtin_ctz(rest);
      std::memcpy(a.at[l], values + l * n * bytes, n * bytes);
    }
  };
}

// ---- atomics

template <class T>
T combine(const std::string& op, T old, T x, T y) {
  if constexpr (std::is_integral_v<T>) {
    if (op == "and") return old & x;
    if (op == "or") return old | x;
    if (op == "xor") return old ^ x;
    if (op == "inc") return old >= x ? T(0) : T(old + 1);
    if (op == "dec") return old == 0 || old > x ? x : T(old - 1);
    if (op == "cas") return old == x ? y : old;
    if (op == "add") return T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(x));
  } else if (op == "add") {
    if constexpr (is_small_float<T>)
      return T(float(old) + float(x));
    else
      return old + x;
  }
  if (op == "min") return x < old ? x : old;
  if (op == "max") return old < x ? x : old;
  return x;  // exch
}

template <class T>
Pair<T> combine(const std::string& op, Pair<T> old, Pair<T> x, Pair<T> y) {
  return {combine(op, old.low, x.low, y.low), combine(op, old.high, x.high, y.high)};
}

template <class T>
Run atomic(const Decoder& d) {
  static const std::set<std::string> known = {"add", "and", "or",   "xor", "inc",
                                              "dec", "cas", "exch", "min", "max"};
  std::string op;
  for (const std::string& part : d.parts) {
    if (known.count(part)) op = part;
  }
  if (op.empty()) d.unknown();
  const bool returns = d.parts[0] == "atom", swaps = op == "cas";
  const uint32_t n = vector_length(d), first = returns ? 1 : 0;
  const Target target = target_of(d, first);
  std::vector<Register> to, x, y;
  if (returns) {
    for (const std::string& name : d.elements(0)) to.push_back(d.write(name, sizeof(T)));
  }
  for (const std::string& name : d.elements(first + 1))
    x.push_back(d.read(name, sizeof(T), d.types.back()));
  y = x;
  if (swaps) y = {d.read(first + 2, sizeof(T), d.types.back())};
  const bool release = d.has("release") || d.has("acq_rel"),
             acquire = d.has("acquire") || d.has("acq_rel");
  return [=](Warp& w, Mask m) {
    Access a(w, m, target, sizeof(T) * n, Use::atomic);
    for (Mask rest = m; rest; rest &= rest - 1) {
      int l = __builtin_ctz(rest);
      if (a.space == Space::global) Heap::instance().synchronise(a.address[l], release, acquire);
      for (uint32_t i = 0; i < n; ++i) {
        T old, next;
        std::memcpy(&old, a.at[l] + i * sizeof(T), sizeof old);
        next = combine(op, old, w.at<T>(x[i])[l], w.at<T>(y[i])[l]);
        std::memcpy(a.at[l] + i * sizeof(T), &next, sizeof next);
        if (returns) w.at<T>(to[i])[l] = old;
      }
    }
  };
}

Run atomic_any(const Decoder& d) {
  const std::string& type = d.types.back();
  if (type == "f32") return atomic<float>(d);
  if (type == "f64") return atomic<double>(d);
  if (type == "f16") return atomic<Half>(d);
  if (type == "bf16") return atomic<BFloat>(d);
  if (type == "f16x2") return atomic<Pair<Half>>(d);
  if (type == "bf16x2") return atomic<Pair<BFloat>>(d);
  if (type == "s32") return atomic<int32_t>(d);
  if (type == "s64") return atomic<int64_t>(d);
  if (type == "b16") return atomic<uint16_t>(d);
  return type_bytes(type) == 8 ? atomic<uint64_t>(d) : atomic<uint32_t>(d);
}

}  // namespace

Run compile_data(const Decoder& d) {
  const std::string& name = d.parts[0];
  if (name == "ld" || name == "ldu") return load(d);
  if (name == "st") return store(d);
  if (name == "atom" || name == "red") {
    if (d.has("async")) d.unknown();
    return atomic_any(d);
  }
  return {};
}

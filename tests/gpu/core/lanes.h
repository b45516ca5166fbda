// What instructions on registers share: the choice of C++ types by PTX types, and a function of one
// to three operands applied lane by lane.
#pragma once
#include <algorithm>

#include "compiler.h"

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

inline bool is_float_type(const std::string& type) {
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

// The type of an element, and that in which it is computed.
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

template <class V>
V saturate(V x) {
  return x > 0 ? std::min<V>(x, 1) : V(0);
}

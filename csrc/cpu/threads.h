#pragma once

#include <cstdint>

namespace fastadapters::cpu {

// How a kernel gets its threads: run(n, body, context) calls body(i, context) once for each i < n,
// on at most `count` threads, and returns when all are done.
struct Threads {
  int count = 1;
  void (*run)(int64_t n, void (*body)(int64_t, void*), void* context) = nullptr;
};

namespace {

// f(i) for each i < n.
template <class F>
inline void parallel(const Threads& threads, int64_t n, const F& f) {
  if (n == 1 || threads.count == 1)
    for (int64_t i = 0; i < n; ++i) f(i);
  else
    threads.run(n, [](int64_t i, void* context) { (*(const F*)context)(i); }, (void*)&f);
}

}  // namespace
}  // namespace fastadapters::cpu

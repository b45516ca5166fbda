#pragma once

#include <cstdint>

namespace fastadapters::cpu {

// How a kernel gets its threads: run(n, body, context) calls body(i, context) once for each i < n,
// on at most `count` threads, and returns when all are done.
struct Threads {
  int count = 1;
  void (*run)(int64_t n, void (*body)(int64_t, void*), void* context) = nullptr;
};

}  // namespace fastadapters::cpu

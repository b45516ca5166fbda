// Memory and tasks of the CPU kernels.
#pragma once

#include <cstdlib>

#include "simd.h"
#include "threads.h"

namespace fastadapters::cpu {
namespace {

// Memory that is kept by its thread from call to call: a fresh allocation would cost page faults.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  char* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = size_t(round_up(bytes + bytes / 4, 4096));
      data_ = (char*)std::aligned_alloc(4096, size_);
      if (!data_) std::abort();
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

// Hands out arrays of a Scratch; from a null base it only counts the bytes needed.
struct Carver {
  char* base = nullptr;
  size_t used = 0;

  template <class T>
  T* take(int64_t n, bool wanted = true) {
    if (!wanted) return nullptr;
    T* p = base ? (T*)(base + used) : nullptr;
    used += size_t(round_up(n * int64_t(sizeof(T)), 64));
    return p;
  }
};

// A Layout is constructed as Layout(Carver&, args...).
template <class Layout, class... Args>
inline Layout carve(Scratch& scratch, const Args&... args) {
  Carver counter;
  Layout(counter, args...);
  Carver carver{scratch.reserve(counter.used), 0};
  return Layout(carver, args...);
}

// One for what a call shares between its tasks, one for what each task needs.
inline Scratch& shared_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}
inline Scratch& task_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace
}  // namespace fastadapters::cpu

// How fast a micro-kernel multiplies, where two can do the same work and CPUs differ in which is
// faster. Each instruction set measures in a source file of its own.
#pragma once

#include <chrono>

#include "gemm.h"

namespace fastadapters::cpu {
namespace {

// Multiply-adds of values of k per second in the first-level cache: the best of several turns of a
// few microseconds, since what disturbs a turn only makes it slower.
template <class G>
double measure() {
  constexpr int64_t words = 64, repetitions = 8, turns = 16;
  constexpr int vectors = G::kPanel;
  constexpr int64_t values = words * G::Unit::kPerWord;
  alignas(64) typename G::Store a[G::kRows * values] = {};
  alignas(64) float b[words * vectors * kLanes] = {};
  double best = 0;
  for (int64_t turn = 0; turn < turns; ++turn) {
    auto begin = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < repetitions; ++i) {
      Vec c[G::kRows][vectors] = {};
      G::template run<vectors>(words, a, values, b, c);
      Vec total = {};
      for (int row = 0; row < G::kRows; ++row)
        for (int j = 0; j < vectors; ++j) total += c[row][j];
      // Whatever this is, the next repetition starts from it: none can be left out.
      store(b, total);
    }
    std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    double rate = repetitions * values * G::kRows * vectors * kLanes / seconds.count();
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace
}  // namespace fastadapters::cpu

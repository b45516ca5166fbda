// In how many shares of the rows backward goes through both of its passes.
#pragma once

#include "../launch.cuh"
#include "walk.cuh"

namespace fastadapters::cuda {

// What a launch takes, with the processors that idle meanwhile, in seconds.
constexpr double kLaunch = 3e-6;

inline double bytes_per_second() {
  int device = 0, kilohertz = 0, bits = 0;  // two transfers a cycle
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, device));
  check(cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device));
  return 2e3 * kilohertz * bits / 8;
}

// Shares are of whole waves of the data pass, two blocks a processor, whose x and dy fit the L2
// cache beside a part of dx, which is the first to leave it: the weight pass finds dy there and,
// behind LayerNorm, x. `spared`: bytes of a row that it need not read from memory. One share unless
// that spares twice what the launches take.
template <class X, class Y>
int count_shares(const DataPass& p, int64_t spared, const Device& device) {
  const int64_t x = p.dim * int64_t(sizeof(typename X::T));
  const int64_t dy = p.out_dim * int64_t(sizeof(typename Y::T));
  const int64_t wave = 2 * int64_t(device.processors) * kRows;
  const int64_t rows = device.l2 / ((x + dy + x / 4) * wave) * wave;
  if (rows == 0 || p.rows <= rows) return 1;
  const int64_t count = (p.rows + rows - 1) / rows;
  const double launches = 2 * double(count - 1) * kLaunch;
  return double(p.rows) * double(spared) > 2 * launches * bytes_per_second() ? int(count) : 1;
}

}  // namespace fastadapters::cuda

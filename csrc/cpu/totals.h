// Sums over more rows than one chain of fp32 additions should have.
#pragma once

#include "scratch.h"

namespace fastadapters::cpu {
namespace {

// What fp32 sums over some rows join now and then, in double: rounding errors do not grow with the
// number of rows. Without `wanted` the fp32 sums are all there is.
struct Totals {
  static constexpr int64_t kRows = 1024;  // about as many are summed in fp32

  int64_t size = 0;
  double* total = nullptr;

  Totals() = default;
  Totals(Carver& c, int64_t size, bool wanted) : size(size), total(c.take<double>(size, wanted)) {}

  void clear() const {
    if (total) std::memset(total, 0, size * sizeof(double));
  }
  // Takes the first n sums, all of which there are by default, and leaves zeros.
  void join(float* sums, int64_t n) const {
    if (!total || !sums) return;
    for (int64_t i = 0; i < n; ++i) total[i] += sums[i];
    std::memset(sums, 0, n * sizeof(float));
  }
  void join(float* sums) const { join(sums, size); }
  // Puts the totals where the last sums are, which they contain then.
  void finish(float* sums, int64_t n) const {
    if (!total || !sums) return;
    for (int64_t i = 0; i < n; ++i) sums[i] = float(total[i] + sums[i]);
  }
  void finish(float* sums) const { finish(sums, size); }
};

}  // namespace
}  // namespace fastadapters::cpu

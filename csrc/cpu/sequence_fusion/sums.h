// The gradients of parameters, summed over rows in levels.
#pragma once

#include "../totals.h"
#include "product.h"

namespace fastadapters::cpu {
namespace {

// fp32 sums over some rows, which now and then join their totals.
struct Sums : Totals {
  int64_t rows = 0;
  float* part = nullptr;

  Sums(Carver& c, int64_t n, bool wanted)
      : Totals(c, round_up(n, kLanes) + kLanes, wanted), part(c.take<float>(size, wanted)) {}

  void clear() const {
    Totals::clear();
    if (part) std::memset(part, 0, size * sizeof(float));
  }
  // To be told after what `more` rows have added.
  void advance(int64_t more) {
    if ((rows += more) >= kRows) flush();
  }
  void flush() {
    if (rows) join(part);
    rows = 0;
  }
  void add(const Sums& other) const {
    for (int64_t i = 0; total && i < size; ++i) total[i] += other.total[i];
  }
};

// n totals to the gradient, from its element `index` on.
inline void write_totals(const double* totals, int64_t n, const Parameter& out, int64_t index) {
  with_type(out, [&](auto* to) {
    for (int64_t j = 0; j < n; j += kLanes) {
      float lanes[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = float(totals[j + lane]);
      store(to + index + j, load(lanes), n - j);
    }
  });
}

// Sums kept as panels of columns, [rows, columns], to the gradient.
inline void write_panels(const double* totals, int64_t rows, int64_t columns, const Columns& panels,
                         const Parameter& out, int64_t index) {
  for (int64_t p = 0; p < panels.count; ++p) {
    int64_t first = panels.first(p) * kLanes, width = panels.size(p) * kLanes;
    for (int64_t i = 0; i < rows; ++i)
      write_totals(totals + rows * first + i * width, least(width, columns - first), out,
                   index + i * columns + first);
  }
}

// Sums kept transposed, rows of `stride`, to the gradient [rows, columns].
inline void write_transposed(const double* totals, int64_t stride, int64_t rows, int64_t columns,
                             const Parameter& out) {
  for (int64_t c = 0; c < columns; c += kLanes)
    for (int64_t i = 0; i < rows; i += kLanes) {
      Vec block[kLanes] = {};
      for (int64_t l = 0; l < least(kLanes, columns - c); ++l)
        for (int lane = 0; lane < kLanes; ++lane)
          block[l][lane] = float(totals[(c + l) * stride + i + lane]);
      transpose(block);
      with_type(out, [&](auto* to) {
        for (int64_t l = 0; l < least(kLanes, rows - i); ++l)
          store(to + (i + l) * columns + c, block[l], columns - c);
      });
    }
}

}  // namespace
}  // namespace fastadapters::cpu

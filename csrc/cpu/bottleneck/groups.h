// Adapters that share the rows of one x: the kernels run on the rows of each.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../bottleneck.h"
#include "../threads.h"

namespace fastadapters::cpu {
namespace {

// Rows sorted by adapter, in their order: those of adapter n are rows[begin[n]] to before
// rows[begin[n + 1]].
struct Sorted {
  std::vector<int64_t> rows, begin;
  Sorted(const Groups& groups, int64_t m) : rows(m), begin(groups.adapters + 1) {
    int64_t entries = m / groups.rows_each;
    for (int64_t i = 0; i < entries; ++i) {
      int64_t n = groups.index[i];
      if (n < 0 || n >= groups.adapters)
        throw std::invalid_argument("index: expected values in [0, " +
                                    std::to_string(groups.adapters) + "), got " +
                                    std::to_string(n));
      begin[n + 1] += groups.rows_each;
    }
    for (int64_t n = 0; n < groups.adapters; ++n) begin[n + 1] += begin[n];
    std::vector<int64_t> next(begin);
    for (int64_t i = 0; i < entries; ++i)
      for (int64_t row = i * groups.rows_each; row < (i + 1) * groups.rows_each; ++row)
        rows[next[groups.index[i]]++] = row;
  }
};

inline int64_t bytes(const Parameter& p, int64_t elements) {
  return elements * (p.dtype == Dtype::float32 ? 4 : 2);
}

// f(a gradient, how many bytes an adapter has of it)
template <class F>
void gradients(BottleneckForward&, const F&) {}

template <class F>
void gradients(BottleneckBackward& p, const F& f) {
  for (const ParameterKind& kind : parameter_kinds(p))
    f(p.*kind.gradient, bytes(p.*kind.gradient, kind.size));
}

// What each adapter has to do, on all threads where it has more than a thread's share of the rows,
// else side by side. Gradients of those without rows are 0.
template <class Args>
void each_adapter(const Args& p, const Groups& groups, const Threads& threads,
                  void (*run)(const Args&, const Threads&)) {
  const Sorted sorted(groups, p.all_rows());
  auto of_adapter = [&](int64_t n) {
    Args args = p;
    auto shift = [n](Parameter& stack, int64_t bytes) {
      if (stack.data) stack.data = (char*)stack.data + n * bytes;
    };
    for (const ParameterKind& kind : parameter_kinds(args))
      shift(args.*kind.parameter, bytes(args.*kind.parameter, kind.size));
    gradients(args, shift);
    args.order = sorted.rows.data() + sorted.begin[n];
    args.ordered = sorted.begin[n + 1] - sorted.begin[n];
    return args;
  };
  std::vector<int64_t> small;
  for (int64_t n = 0; n < groups.adapters; ++n) {
    Args args = of_adapter(n);
    if (args.ordered * threads.count > p.all_rows())
      run(args, threads);
    else if (args.ordered)
      small.push_back(n);
    else
      gradients(args, [](const Parameter& stack, int64_t bytes) {
        if (stack.data) std::memset(stack.data, 0, bytes);
      });
  }
  parallel(threads, int64_t(small.size()),
           [&](int64_t i) { run(of_adapter(small[i]), Threads{}); });
}

}  // namespace
}  // namespace fastadapters::cpu

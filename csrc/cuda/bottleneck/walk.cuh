// How the data pass goes over its rows, and what it keeps in shared memory on the way.
//
// One block takes 64 rows through the whole op. It walks over the columns of D_in in chunks of 128
// bytes (of the compute dtype) to project down (z stays in registers, h in shared memory), then
// back over those of D_out to project up. Chunks of activations land in a ring; where x is the
// residual, the walk back finds the youngest of them still there and re-reads the others, which are
// in the L2 cache. Backward is the same walk with dy for x, over D_out and back over D_in: only
// LayerNorm, whose gradient reads x, makes it project x down once more.
#pragma once

#include <algorithm>

#include "problem.cuh"

namespace fastadapters::cuda {

constexpr int kLargestLookahead = 2;

struct DataPass : Problem {
  Activations tail;        // forward: the residual; backward: dy
  Activations out;         // y or dx
  bool keep_tail = false;  // the tail is what the last pass down has left in the ring
  bool add_tail = false;
  bool read_x = true, read_tail = false;  // by the passes down
  int first_tile = 0;                     // of a launch
  int ring = 0, lookahead = 0, shared = 0;
  // [M, r]: forward may store it, backward without norm loads it. If h is kept in its place, which
  // tells the derivative of the activation as well, the weights' gradients can take it from there.
  char* z = nullptr;
  bool keeps_h = false;
  char* hidden = nullptr;  // backward: h and dz for the weight gradients, [M, width]
  char* d_hidden = nullptr;
  // backward: columns of dWu that a block accumulates, a multiple of 8, or 0; what it makes,
  // [blocks, D_out, units] and [blocks, D_out]
  int units = 0;
  float* up_products = nullptr;
  float* up_sums = nullptr;
};

// Where the walk is: for each part of r it goes down over x and over the tail, as far as they are
// read; then back, with all parts of a chunk. `slot` and `weights` are places in the rings of
// activations and of weights.
enum class Way { x, tail, back };

struct Walk {
  Way way;
  int chunk = 0, part = 0, slot = 0, weights = 0;

  __device__ __forceinline__ explicit Walk(const DataPass& p) : way(first(p)) {}

  static __device__ __forceinline__ Way first(const DataPass& p) {
    return p.read_x ? Way::x : p.read_tail ? Way::tail : Way::back;
  }

  __device__ __forceinline__ void advance(const DataPass& p) {
    weights = weights == p.lookahead ? 0 : weights + 1;
    if (way == Way::back) {
      if (++part < p.parts) return;
      part = 0;
      ++chunk;
      if (p.keep_tail) {
        slot = slot == 0 ? p.ring - 1 : slot - 1;
        return;
      }
    } else if (++chunk == (way == Way::x ? p.chunks : p.out_chunks)) {
      chunk = 0;
      if (way == Way::x && p.read_tail) {
        way = Way::tail;
      } else if (++part < p.parts) {
        way = first(p);
      } else {
        part = 0;
        way = Way::back;
        if (p.keep_tail) return;  // the way back begins where the way down ended
      }
    }
    slot = slot == p.ring - 1 ? 0 : slot + 1;
  }
};

// Sizes of what a block multiplies: chunks of D and parts of r.
template <class E, int kWidth>
struct Sizes {
  static constexpr int kSize = sizeof(typename E::T);
  static constexpr int kChunk = kLine / kSize;  // columns of D
  static constexpr int kHiddenPanels = (kWidth * kSize - 1) / kLine + 1;
  static constexpr int kHiddenLine = std::min(kWidth * kSize, kLine);  // bytes used of their rows
  static constexpr int kUp = kChunk * kLine;                           // bytes in a panel of `up`
  static constexpr int kWeights = std::max(kWidth * kLine, kHiddenPanels* kUp);
};

// Places in shared memory, for x stored as X, tail (and y) as Y. The hidden rows are panels of one
// part after another. Where dWu is accumulated, h lies beside dz or in a panel behind it.
template <class E, int kWidth, class X, class Y>
struct Layout : Sizes<E, kWidth> {
  using Sizes<E, kWidth>::kWeights;
  using Sizes<E, kWidth>::kHiddenPanels;
  static constexpr int kX = kPanels<E, X> * kPanel;
  static constexpr int kSlot = std::max(kX, kPanels<E, Y>* kPanel);

  struct Tables {
    int64_t x[kRows], tail[kRows], out[kRows];  // where the rows start
    float2 stats[kRows];
    float2 row_sums[2][kRows];  // dz . down_sums and dz . (z - bias), a half of the columns each
  };

  static constexpr bool kBeside = 2 * Sizes<E, kWidth>::kHiddenLine <= kLine;

  int hidden, extra, tables, accumulators, bytes;

  __host__ __device__ Layout(const DataPass& p, bool extra_x) {
    const int weights = p.ring * kSlot;
    hidden = weights + (p.lookahead + 1) * kWeights;
    extra = hidden + (p.parts * kHiddenPanels + (p.units && !kBeside)) * kPanel;
    tables = extra + (extra_x ? (p.lookahead + 1) * kX : 0);
    accumulators = tables + int(sizeof(Tables));
    bytes =
        accumulators + (p.units ? p.out_chunks * Sizes<E, kWidth>::kChunk * (p.units + 1) * 4 : 0);
  }
};

}  // namespace fastadapters::cuda

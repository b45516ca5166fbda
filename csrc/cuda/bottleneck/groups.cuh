// Rows of several adapters, taken in their order by adapter: who has which is found on the device,
// which nobody waits for.
#pragma once

#include "../../bottleneck.h"
#include "../launch.cuh"

namespace fastadapters::cuda {

// Places in the order by adapter: `rows` from `first` on, all of one adapter, or of none (-1).
struct Run {
  int first, rows, adapter;
};

struct Plan {
  Groups groups;
  int entries = 0, chunks = 0;  // of the index
  int tiles_per_split = 1;
  int tile_count = 0, split_count = 0;  // as many as there can be; the last ones have no rows
  // [N + 1, chunks]: the first place, in entries, of a chunk's entries of an adapter. The last are
  // those that name none.
  int* starts = nullptr;
  int* tile_begin = nullptr;   // [N + 2]: each one's first tile
  int* split_begin = nullptr;  // [N + 1]: each adapter's first split
  int* order = nullptr;        // [M]: the row at each place; an adapter's rows keep their order
  Run* tiles = nullptr;        // up to kRows rows, for a block of the data pass
  Run* splits = nullptr;       // up to tiles_per_split tiles, for the sums of the weight pass
};

// The memory of a plan for M rows; without splits where tiles_per_split is 0.
Plan take_plan(const Groups& groups, int64_t rows, int tiles_per_split, Arena* arena);

// Fills it, in three launches however many adapters and rows there are.
void make_plan(const Plan& plan, cudaStream_t stream);

}  // namespace fastadapters::cuda

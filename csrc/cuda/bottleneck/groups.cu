#include <algorithm>

#include "groups.cuh"

namespace fastadapters::cuda {
namespace {

constexpr int kEntries = 256;  // in a chunk of the index, and threads in a block

// An entry of this block's chunk: its adapter (N if it names none, -1 beyond the index), how many
// of the chunk's entries before it have the same, and whether none behind it has.
struct Entry {
  int adapter, rank;
  bool last;
};

__device__ __forceinline__ Entry entry_of_thread(const Plan& p) {
  __shared__ int adapters[kEntries];
  const int entry = int(blockIdx.x) * kEntries + threadIdx.x, known = int(p.groups.adapters);
  int adapter = -1;
  if (entry < p.entries) {
    const int64_t named = p.groups.index[entry];
    adapter = named >= 0 && named < known ? int(named) : known;
  }
  adapters[threadIdx.x] = adapter;
  __syncthreads();
  Entry result = {adapter, 0, true};
  for (int i = 0; i < kEntries; ++i) {
    const bool same = adapters[i] == adapter;
    result.rank += same && i < threadIdx.x;
    result.last &= !same || i <= threadIdx.x;
  }
  return result;
}

// Block: a chunk, whose entries are counted.
__global__ void __launch_bounds__(kEntries) count_entries(const __grid_constant__ Plan p) {
  for (int n = threadIdx.x; n <= p.groups.adapters; n += kEntries) {
    p.starts[int64_t(n) * p.chunks + blockIdx.x] = 0;
  }
  const Entry entry = entry_of_thread(p);  // and a barrier
  if (entry.adapter >= 0 && entry.last) {
    p.starts[int64_t(entry.adapter) * p.chunks + blockIdx.x] = entry.rank + 1;
  }
}

// By one block: to[i] = the sum of value(0) ... value(i - 1), up to i = count.
template <class Value>
__device__ __forceinline__ void sums_before(int* to, int count, Value value) {
  __shared__ int warps[kEntries / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = 0;
  for (int first = 0; first < count; first += kEntries) {
    const int i = first + threadIdx.x, own = i < count ? value(i) : 0;
    int sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffff, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    int total = 0;
    for (int w = 0; w < kEntries / 32; ++w) {
      if (w == warp) sum += total;
      total += warps[w];
    }
    if (i < count) to[i] = before + sum - own;
    before += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) to[count] = before;
}

// The first place of adapter n's rows; that of those who name none for N, M for N + 1.
__device__ __forceinline__ int begin_of(const Plan& p, int n) {
  const int entry = n > p.groups.adapters ? p.entries : p.starts[int64_t(n) * p.chunks];
  return entry * int(p.groups.rows_each);
}

// One block turns counts into places, and counts tiles and splits.
__global__ void __launch_bounds__(kEntries) find_begins(const __grid_constant__ Plan p) {
  const int adapters = int(p.groups.adapters);
  sums_before(p.starts, (adapters + 1) * p.chunks, [&](int i) { return p.starts[i]; });
  const auto tiles = [&](int n) {
    return (begin_of(p, n + 1) - begin_of(p, n) + kRows - 1) / kRows;
  };
  sums_before(p.tile_begin, adapters + 1, tiles);
  if (!p.splits) return;
  sums_before(p.split_begin, adapters,
              [&](int n) { return (tiles(n) + p.tiles_per_split - 1) / p.tiles_per_split; });
}

// Run i of `length` places, of adapters (`count` of them) whose first runs are begin[n].
__device__ __forceinline__ Run find_run(const Plan& p, const int* begin, int count, int length,
                                        int i) {
  if (i >= begin[count]) return {0, 0, -1};
  int n = 0;  // the last one that begins up to i
  for (int end = count; end - n > 1;) {
    const int middle = (n + end) / 2;
    (begin[middle] <= i ? n : end) = middle;
  }
  const int first = begin_of(p, n) + (i - begin[n]) * length;
  return {first, min(begin_of(p, n + 1) - first, length), n < p.groups.adapters ? n : -1};
}

// Block (chunk, share of its rows) puts rows in their places; all of them make the tables.
__global__ void __launch_bounds__(kEntries) place_rows(const __grid_constant__ Plan p) {
  __shared__ int places[kEntries];
  const Entry entry = entry_of_thread(p);
  const int rows_each = int(p.groups.rows_each), first = int(blockIdx.x) * kEntries;
  if (entry.adapter >= 0) {
    const int start = p.starts[int64_t(entry.adapter) * p.chunks + blockIdx.x];
    places[threadIdx.x] = (start + entry.rank) * rows_each;
  }
  __syncthreads();
  const int rows = min(p.entries - first, kEntries) * rows_each;
  for (int i = int(blockIdx.y) * kEntries + threadIdx.x; i < rows; i += gridDim.y * kEntries) {
    const int of = i / rows_each;
    p.order[places[of] + i - of * rows_each] = first * rows_each + i;
  }
  const int adapters = int(p.groups.adapters);
  const int thread = int(blockIdx.y * gridDim.x + blockIdx.x) * kEntries + threadIdx.x;
  for (int i = thread; i < p.tile_count; i += gridDim.x * gridDim.y * kEntries) {
    p.tiles[i] = find_run(p, p.tile_begin, adapters + 1, kRows, i);
  }
  for (int i = thread; i < p.split_count; i += gridDim.x * gridDim.y * kEntries) {
    p.splits[i] = find_run(p, p.split_begin, adapters, p.tiles_per_split * kRows, i);
  }
}

}  // namespace

Plan take_plan(const Groups& groups, int64_t rows, int tiles_per_split, Arena* arena) {
  Plan p;
  p.groups = groups;
  p.entries = int(rows / groups.rows_each);
  p.chunks = (p.entries + kEntries - 1) / kEntries;
  // Of each that occurs the last tile, and the last split, need not be full.
  const int64_t occur = std::min<int64_t>(groups.adapters + 1, p.entries);
  p.tile_count = int((rows + occur * (kRows - 1)) / kRows);
  p.starts = arena->take<int>(((groups.adapters + 1) * p.chunks + 1) * 4);
  p.tile_begin = arena->take<int>((groups.adapters + 2) * 4);
  p.order = arena->take<int>(rows * 4);
  p.tiles = arena->take<Run>(p.tile_count * int64_t(sizeof(Run)));
  if (tiles_per_split > 0) {
    p.tiles_per_split = tiles_per_split;
    p.split_count = int((p.tile_count + occur * (tiles_per_split - 1)) / tiles_per_split);
    p.split_begin = arena->take<int>((groups.adapters + 1) * 4);
    p.splits = arena->take<Run>(p.split_count * int64_t(sizeof(Run)));
  }
  return p;
}

void make_plan(const Plan& plan, cudaStream_t stream) {
  launch(count_entries, plan.chunks, kEntries, 0, stream, plan);
  launch(find_begins, 1, kEntries, 0, stream, plan);
  const int shares = int(std::min<int64_t>((plan.groups.rows_each + 15) / 16, 1024));
  launch(place_rows, dim3(plan.chunks, shares), kEntries, 0, stream, plan);
}

}  // namespace fastadapters::cuda

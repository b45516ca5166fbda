// Launches the kernels of the sequence fusion for products in one dtype.
#pragma once

#include <algorithm>

#include "../launch.cuh"
#include "inputs.cuh"
#include "reduce.cuh"

namespace fastadapters::cuda::fusion {

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

inline int widest(const SequenceFusion& op) {
  int64_t width = 0;
  for (int m = 0; m < op.modalities; ++m) width = std::max(width, op.modality[m].width);
  return int(width);
}

// What forward and backward share.
template <class E>
void set_up(const SequenceFusion& op, Problem* p) {
  p->modalities = op.modalities;
  p->items = int(op.items);
  p->out_len = int(op.out_len);
  p->dim = int(op.dim);
  p->rank = int(op.rank());
  p->time_copies = op.summed ? int(op.time_rank) : 1;
  p->feature_copies = op.summed ? int(op.feature_rank) : 1;
  p->activation = op.activation;
  p->add_leading = op.add_leading;
  p->wide_out = op.out_dtype != op.dtype;
  float* products = op.products;
  char* z = static_cast<char*>(op.z);
  for (int m = 0; m < op.modalities; ++m) {
    const Modality& from = op.modality[m];
    Input& to = p->input[m];
    p->tiles += int(divide_up(from.tokens, kRows));
    const int64_t sizes[3] = {1, op.items, from.tokens};
    to.x = activations(sizes, from.x_dtype, from.x);
    to.tokens = int(from.tokens);
    to.dim = int(from.dim);
    to.width = int(from.width);
    to.factor_tokens = int(from.factor_tokens);
    to.padded = int(round_up(from.width, widest(op) > kPart ? 64 : kPart));
    to.tiles = int(divide_up(from.tokens, kRows));
    to.wide_x = from.x_dtype != op.dtype;
    to.lengths = from.lengths;
    to.down_weight = from.down_weight;
    to.down_bias = from.down_bias;
    to.time_factor = from.time_factor;
    to.feature_factor = from.feature_factor;
    to.products = products;
    to.z = z;
    if (products) products += op.items * op.rank() * op.out_len * from.width;
    if (z) z += op.items * from.tokens * from.width * int64_t(sizeof(typename E::T));
  }
}

// Whether one block takes an item through everything that an item's P depends on: where there are
// so few steps of loading that another launch would take longer than they do one after the other.
template <class E>
bool is_small(const SequenceFusion& op, const Problem& p) {
  if (widest(op) > kPart) return false;
  int64_t steps = divide_up(p.dim, kTile) * divide_up(p.out_len, kTile) * p.rank * p.modalities;
  for (int m = 0; m < p.modalities; ++m) {
    const Input& in = p.input[m];
    steps += in.tiles * (divide_up(in.dim * int64_t(sizeof(typename E::T)), kLine) + 2);
  }
  return steps <= 32;
}

// Shared memory that a pass over x takes, as the modalities' x are stored.
template <class Bytes>
int most_shared(const Problem& p, Bytes bytes) {
  int most = 0;
  for (int m = 0; m < p.modalities; ++m) most = std::max(most, int(bytes(p.input[m])));
  return most;
}

template <class E>
void run(const SequenceFusionForward& op, Arena* arena, cudaStream_t stream) {
  ForwardPass p;
  set_up<E>(op, &p);
  for (int m = 0; m < p.modalities; ++m) {
    Input& in = p.input[m];
    in.partials = arena->take<float>(int64_t(in.tiles) * p.items * p.factors() * in.width * 4);
  }
  if (arena->counting || p.items == 0) return;
  const int64_t sizes[3] = {1, op.items, op.out_len};
  p.residual = activations(sizes, op.out_dtype, op.residual);
  p.out = activations(sizes, op.out_dtype, op.y);

  const bool wide = widest(op) > kPart;
  const int down_bytes = most_shared(p, [&](const Input& in) {
    if (wide) return in.wide_x ? Down<E, 64, Full>::kBytes : Down<E, 64, E>::kBytes;
    return in.wide_x ? Down<E, kPart, Full>::kBytes : Down<E, kPart, E>::kBytes;
  });
  constexpr int kFuseBytes = 2 * Step<E>::kBytes;
  if (is_small<E>(op, p)) {
    return launch(forward<E>, p.items, kThreads, std::max(down_bytes, kFuseBytes), stream, p);
  }
  p.half = Half::down;
  if (wide) {
    launch<Problem>(down_wide<E>, p.tiles * p.items, kThreads, down_bytes, stream, p);
  } else {
    launch(forward<E>, p.tiles * p.items, kThreads, down_bytes, stream, p);
  }
  p.half = Half::fuse;
  const dim3 grid(divide_up(int64_t(p.items) * p.out_len, kTile), divide_up(p.dim, kTile));
  launch(forward<E>, grid, kThreads, kFuseBytes, stream, p);
}

// The gradients of a modality's parameters, as sums of partial ones.
inline void add_jobs(const Problem& p, const Input& in,
                     const SequenceFusionBackward::Gradients& wanted, int row_groups,
                     int item_groups, Jobs* jobs) {
  const auto add = [&](const Parameter& sum, const float* partials, int count, int64_t apart,
                       const int64_t (&sizes)[3], const int64_t (&from)[3], const int64_t (&to)[3],
                       int limit, int copies, int64_t copy_apart) {
    if (!sum.data) return;
    Job& job = jobs->job[jobs->count++];
    job.sum = sum;
    job.partials = partials;
    job.count = p.items ? count : 0;
    job.apart = apart;
    job.limit = limit;
    job.copies = copies;
    job.copy_apart = copy_apart;
    for (int i = 0; i < 3; ++i) job.sizes[i] = int(sizes[i]), job.from[i] = from[i];
    for (int i = 0; i < 3; ++i) job.to[i] = to[i];
    job.blocks = int(divide_up(sizes[0] * sizes[1] * sizes[2], kReduceThreads));
  };
  const int64_t d = in.dim, r = in.width, o = p.out_len, t = in.factor_tokens, y = p.dim;
  const int64_t padded = in.padded, tokens = int64_t(in.tiles) * kRows;
  add(wanted.d_down_weight, in.d_down_weight, in.splits, in.slabs * kSlab * padded, {1, d, r},
      {0, padded, 1}, {0, 1, d}, int(r), 1, 0);
  add(wanted.d_down_bias, in.d_down_bias, item_groups * in.tiles, padded, {1, 1, r}, {0, 0, 1},
      {0, 0, 1}, int(r), 1, 0);
  add(wanted.d_time_factor, in.d_time_factor, item_groups, p.factors() * tokens, {p.rank, o, t},
      {o * tokens, tokens, 1}, {t * o, 1, o}, in.tokens, p.time_copies, t * o);
  add(wanted.d_feature_factor, in.d_feature_factor, row_groups, p.rank * r * y, {p.rank, r, y},
      {r * y, y, 1}, {r * y, y, 1}, int(y), p.feature_copies, r * y);
}

template <class E, int kWidth>
void run_inputs(InputPass& p, int blocks, const Device& device, cudaStream_t stream) {
  const int stage = most_shared(p, [](const Input& in) {
    return in.wide_x ? Inputs<E, kWidth, Full>::kBytes : Inputs<E, kWidth, E>::kBytes;
  });
  p.stages = 3 * stage <= device.shared_per_processor / 2 - 1024 ? 3 : 2;  // if two blocks fit
  launch(inputs<E, kWidth>, blocks, kThreads, p.stages * stage, stream, p);
}

template <class E>
void run(const SequenceFusionBackward& op, Arena* arena, cudaStream_t stream) {
  InputPass p;
  set_up<E>(op, &p);
  const Device device = current_device();
  const bool small = is_small<E>(op, p);

  // Into how many groups the rows and columns of y and the items are cut: as many as keep the
  // device busy, and no more, for each has partial sums of its own.
  const int64_t busy = 4 * device.processors;
  const int64_t row_tiles = divide_up(int64_t(p.items) * p.out_len, kTile);
  const int64_t column_tiles = divide_up(p.dim, kTile);
  p.column_tiles_per_group = int(small ? column_tiles : divide_up(column_tiles, 8));
  const int column_groups = int(divide_up(column_tiles, p.column_tiles_per_group));
  const int64_t rows_wanted = divide_up(busy, int64_t(column_groups) * p.rank);
  p.row_tiles_per_group = int(std::max<int64_t>(divide_up(row_tiles, rows_wanted), 1));
  const int64_t items_wanted = small ? busy : divide_up(busy, p.tiles);
  p.items_per_group = int(std::max<int64_t>(divide_up(p.items, items_wanted), 1));
  const int item_groups = int(divide_up(p.items, p.items_per_group));
  const int row_groups = small ? item_groups : int(divide_up(row_tiles, p.row_tiles_per_group));

  int64_t work = 0;  // tiles of x
  for (int m = 0; m < p.modalities; ++m) {
    work +=
        divide_up(int64_t(p.items) * p.input[m].tokens, kRows) * divide_up(p.input[m].dim, kSlab);
  }
  const int64_t work_per_block = std::max<int64_t>(divide_up(work, busy), 1);

  bool factors_wanted = false, hidden_wanted = false;
  int input_blocks = 0;
  Jobs jobs;
  for (int m = 0; m < p.modalities; ++m) {
    const SequenceFusionBackward::Gradients& wanted = op.gradients[m];
    Input& in = p.input[m];
    const bool x = wanted.dx.data || wanted.d_down_weight.data;
    const bool dz = x || wanted.d_down_bias.data;
    const bool dp = dz || wanted.d_time_factor.data;
    const int64_t pairs = p.factors(), r = in.width, rows = int64_t(p.items) * in.tokens;
    const int64_t x_tiles = divide_up(rows, kRows);
    in.slabs = int(divide_up(in.dim, kSlab));
    in.tiles_per_split = int(std::max<int64_t>(std::min(work_per_block, x_tiles), 1));
    in.splits = x ? int(divide_up(x_tiles, in.tiles_per_split)) : 0;
    if (dp) in.d_products = arena->take<float>(column_groups * p.items * pairs * r * 4);
    if (dz) in.dz = arena->take<char>(rows * in.padded * int64_t(sizeof(typename E::T)));
    const auto partials = [&](const Parameter& sum, int64_t count) {
      return sum.data ? arena->take<float>(count * 4) : nullptr;
    };
    in.d_down_weight =
        partials(wanted.d_down_weight, int64_t(in.splits) * in.slabs * kSlab * in.padded);
    in.d_down_bias = partials(wanted.d_down_bias, int64_t(item_groups) * in.tiles * in.padded);
    in.d_time_factor = partials(wanted.d_time_factor, item_groups * pairs * in.tiles * kRows);
    in.d_feature_factor =
        partials(wanted.d_feature_factor, int64_t(row_groups) * p.rank * r * p.dim);
    factors_wanted |= dp || wanted.d_feature_factor.data;
    hidden_wanted |= dp;
    input_blocks += in.slabs * in.splits;
    const int64_t sizes[3] = {1, op.items, in.tokens};
    in.dx = activations(sizes, op.modality[m].x_dtype, wanted.dx);
    p.read_x[m] = wanted.d_down_weight.data != nullptr;
    add_jobs(p, in, wanted, row_groups, item_groups, &jobs);
  }
  if (arena->counting) return;

  if (p.items > 0 && factors_wanted) {
    const int64_t sizes[3] = {1, op.items, op.out_len};
    p.out = activations(sizes, op.out_dtype, op.dy);
    BackwardPass b;
    static_cast<Problem&>(b) = p;
    const int factor_bytes = FactorLayout<E>::bytes(p.modalities);
    constexpr int kHiddenBytes = HiddenLayout<E>::kBytes;
    if (small) {
      launch(backward<E>, item_groups, kThreads, std::max(factor_bytes, kHiddenBytes), stream, b);
    } else {
      b.half = BackwardHalf::factors;
      launch(backward<E>, dim3(column_groups, row_groups, p.rank), kThreads, factor_bytes, stream,
             b);
      b.half = BackwardHalf::hidden;
      if (hidden_wanted) {
        launch(backward<E>, dim3(p.tiles, item_groups), kThreads, kHiddenBytes, stream, b);
      }
    }
    if (input_blocks > 0 && widest(op) > kPart) {
      run_inputs<E, 64>(p, input_blocks, device, stream);
    } else if (input_blocks > 0) {
      run_inputs<E, kPart>(p, input_blocks, device, stream);
    }
  }
  int blocks = 0;
  for (int i = 0; i < jobs.count; ++i) blocks += jobs.job[i].blocks;
  if (blocks > 0) launch(reduce, blocks, kReduceThreads, 0, stream, jobs);
}

}  // namespace fastadapters::cuda::fusion

// Launches the bottleneck's kernels for products in one dtype.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../launch.cuh"
#include "data_pass.cuh"
#include "gradients.cuh"
#include "prepare.cuh"

namespace fastadapters::cuda {

// Fills in what forward and backward share, and prepares the weights.
template <class E, int kWidth>
void set_up(const Bottleneck& op, bool fold_scale, Arena* arena, cudaStream_t stream, Problem* p) {
  constexpr int kSize = sizeof(typename E::T);
  p->rows = int(op.count());
  p->middle = int(op.rows[1]);
  p->inner = int(op.rows[2]);
  p->dim = int(op.dim);
  p->bottleneck = int(op.bottleneck);
  p->chunks = int((op.dim * kSize + kLine - 1) / kLine);
  p->parts = int((op.bottleneck + kWidth - 1) / kWidth);
  p->width = int(round_up(op.bottleneck, 16));
  p->x = activations(op.rows, op.x_dtype, op.x);
  p->up_bias = vector(op.up_bias);
  p->scale = vector(op.scale);
  p->channel_scale = op.channel_scale;
  p->scale_value = op.scale_value;
  p->norm_eps = op.norm_eps;
  p->activation = op.activation;
  p->seed = op.seed;
  p->threshold = dropout_threshold(op.dropout);
  p->keep = op.seed == nullptr ? 1 : op.dropout < 1 ? float(1 / (1 - op.dropout)) : 0;
  p->stats = reinterpret_cast<float2*>(op.stats);

  const bool norm = op.norm_weight.data != nullptr;
  const auto usable = [&](const Parameter& v, int64_t columns) {
    return v.dtype == op.dtype && columns * kSize % 16 == 0 && on_16_bytes(v.data);
  };
  Preparation work;
  work.op = op;
  work.fold_scale = fold_scale;
  work.down_stride = round_up(op.dim * kSize, 16);
  work.up_stride = round_up(op.bottleneck * kSize, 16);
  const bool down = norm || !usable(op.down_weight, op.dim);
  const bool up = fold_scale || !usable(op.up_weight, op.bottleneck);
  if (down) work.down = arena->take<char>(op.bottleneck * work.down_stride);
  if (up) work.up = arena->take<char>(op.dim * work.up_stride);
  if (norm) {
    work.down_sums = arena->take<float>(op.bottleneck * 4);
    work.down_bias = arena->take<float>(op.bottleneck * 4);
  }
  if (arena->counting) return;
  p->down = {down ? work.down : static_cast<const char*>(op.down_weight.data), work.down_stride};
  p->up = {up ? work.up : static_cast<const char*>(op.up_weight.data), work.up_stride};
  p->down_sums = norm ? work.down_sums : nullptr;
  p->down_bias = norm ? Vector{work.down_bias, Dtype::float32, true} : vector(op.down_bias);
  if (!(down || up) || p->rows == 0) return;
  const int blocks = (down ? p->bottleneck : 0) + (up ? (p->dim + kUpRows - 1) / kUpRows : 0);
  launch(prepare_weights<E>, blocks, 256, 0, stream, work);
}

// Divides shared memory: two blocks should share a processor, so that one computes while the other
// waits for memory, but one has it where it accumulates dWu; what they leave goes to the ring.
// False if there is too little.
template <class E, int kWidth, bool kBackward, class X, class Y>
bool arrange(DataPass& p, const Device& device) {
  using L = Layout<E, kWidth, X, Y>;
  const bool extra_x = kBackward && p.down_sums && p.out.data;
  for (int blocks = p.units ? 1 : 2; blocks > 0; --blocks) {
    const int budget =
        std::min(device.shared_per_block, device.shared_per_processor / blocks - 1024);
    for (p.lookahead = kLargestLookahead; p.lookahead > 0; --p.lookahead) {
      p.ring = p.lookahead + 1;
      p.shared = L(p, extra_x).bytes;
      if (p.shared > budget) continue;
      if (p.keep_tail) {
        p.ring = std::max(p.ring, std::min(p.chunks, p.ring + (budget - p.shared) / L::kSlot));
        p.shared = L(p, extra_x).bytes;
      }
      return true;
    }
  }
  return false;
}

template <class E, int kWidth, bool kBackward, class X, class Y>
void run_data_pass(DataPass& p, const Device& device, cudaStream_t stream) {
  if (!arrange<E, kWidth, kBackward, X, Y>(p, device)) {
    throw std::runtime_error("fastadapters: r = " + std::to_string(p.bottleneck) +
                             " is too large for the CUDA kernels: a block would take " +
                             std::to_string(p.shared) + " bytes of shared memory of " +
                             std::to_string(device.shared_per_block));
  }
  launch(data_pass<E, kWidth, kBackward, false, X, Y>, (p.rows + kRows - 1) / kRows, kThreads,
         p.shared, stream, p);
}

// Whether there is a kernel that accumulates dWu: in 16 bits, where r may be at most 32.
template <class E, int kWidth, class X, class Y>
constexpr bool kAccumulates =
    sizeof(typename E::T) == 2 && (kWidth == 32 || !std::is_same_v<X, E> || !std::is_same_v<Y, E>);

template <class E, int kWidth, class X, class Y>
void run(const BottleneckForward& op, Arena* arena, cudaStream_t stream) {
  DataPass p;
  set_up<E, kWidth>(op, false, arena, stream, &p);
  if (arena->counting || p.rows == 0) return;
  p.tail = activations(op.rows, op.out_dtype, op.residual);
  p.out = activations(op.rows, op.out_dtype, op.y);
  p.z = static_cast<char*>(op.z);
  p.add_tail = op.residual.data != nullptr;
  p.keep_tail = op.residual.data == op.x.data && op.x_dtype == op.out_dtype &&
                std::equal(op.x.strides, op.x.strides + 3, op.residual.strides);
  run_data_pass<E, kWidth, false, X, Y>(p, current_device(), stream);
}

template <class E, int kWidth, class S>
void run_weight_pass(const WeightPass& p, int splits, int jobs, cudaStream_t stream) {
  using Stage = Stages<E, kWidth, S>;
  launch(weight_pass<E, kWidth, S>, dim3(p.chunks * p.parts, splits, jobs), kThreads,
         Stage::kCount * Stage::kBytes, stream, p);
}

// In how many blocks the data pass accumulates dWu, or 0: it does where shared memory has room for
// [D, r] and the partial sums are fewer bytes than the dy that a pass of its own would read.
template <class E, int kWidth, class X, class Y>
int accumulating_blocks(const BottleneckBackward& op, DataPass p, const Device& device) {
  constexpr bool kThere = kAccumulates<E, kWidth, X, Y>;
  const bool wanted = op.needs_dz() && (op.d_up_weight.data || op.d_scale.data);
  if (!kThere || !wanted || op.norm_weight.data || op.bottleneck > 32) return 0;
  const int64_t tiles = (p.rows + kRows - 1) / kRows;
  const int64_t tiles_per_block =
      std::max<int64_t>(round_up(tiles, device.processors) / device.processors, 1);
  const int64_t blocks = (tiles + tiles_per_block - 1) / tiles_per_block;
  p.units = p.width;
  const int64_t saved = tiles * kRows * int64_t(sizeof(typename Y::T));
  if (saved <= blocks * p.units * 8 || !arrange<E, kWidth, true, X, Y>(p, device)) return 0;
  return int(blocks);
}

template <class E, int kWidth, class X, class Y>
void run(const BottleneckBackward& op, Arena* arena, cudaStream_t stream) {
  DataPass p;
  set_up<E, kWidth>(op, op.channel_scale, arena, stream, &p);
  const Device device = current_device();

  const bool down =
      op.d_down_weight.data || op.d_down_bias.data || op.d_norm_weight.data || op.d_norm_bias.data;
  const bool up = op.d_up_weight.data || op.d_up_bias.data || op.d_scale.data;
  const int blocks = accumulating_blocks<E, kWidth, X, Y>(op, p, device);
  const int64_t hidden_bytes = int64_t(p.rows) * p.width * int64_t(sizeof(typename E::T));
  if (up && !blocks) p.hidden = arena->take<char>(hidden_bytes);
  if (down) p.d_hidden = arena->take<char>(hidden_bytes);

  // The rows are split so that two blocks on each processor share the work.
  const int tiles = (p.rows + kRows - 1) / kRows, jobs = int(down) + int(up && !blocks);
  const int columns = std::max(p.chunks * p.parts * jobs, 1);
  const int wanted = std::max(2 * device.processors / columns, 1);
  const int tiles_per_split = std::max((tiles + wanted - 1) / wanted, 1);
  const int splits = (tiles + tiles_per_split - 1) / tiles_per_split;
  Partial partials[2];
  if (down) partials[0] = {splits, p.width};
  if (up) partials[1] = {blocks ? blocks : splits, p.width};
  for (int job = 0; job < 2; ++job) {
    Partial& partial = partials[job];
    partial.products = arena->take<float>(partial.splits * op.dim * partial.width * 4);
    partial.sums = arena->take<float>(partial.splits * (job == 0 ? p.width : op.dim) * 4);
  }
  float* const d_scales = arena->take<float>(op.dim * 4);
  if (arena->counting) return;

  if (p.rows > 0) {
    p.tail = activations(op.rows, op.out_dtype, op.dy);
    p.out = activations(op.rows, op.x_dtype, op.dx);
    p.add_tail = p.keep_tail = op.add_dy;
    p.z = static_cast<char*>(op.z);
    p.x_passes = p.down_sums ? 1 : 0;
    p.tail_passes = op.needs_dz() ? 1 : 0;
    if constexpr (kAccumulates<E, kWidth, X, Y>) {
      if (blocks) {
        p.units = p.width;
        p.up_products = partials[1].products;
        p.up_sums = partials[1].sums;
        arrange<E, kWidth, true, X, Y>(p, device);
        launch(data_pass<E, kWidth, true, true, X, Y>, blocks, kThreads, p.shared, stream, p);
      }
    }
    if (op.needs_z() && !blocks) run_data_pass<E, kWidth, true, X, Y>(p, device, stream);
    if (!(down || up)) return;

    WeightPass w;
    static_cast<Problem&>(w) = p;
    w.dy = p.tail;
    w.hidden = p.hidden;
    w.d_hidden = p.d_hidden;
    w.first_job = down ? 0 : 1;
    w.rows_per_split = tiles_per_split * kRows;
    std::copy(partials, partials + 2, w.partials);
    if (std::is_same_v<X, Y> || !up || blocks) {
      if (jobs) run_weight_pass<E, kWidth, X>(w, splits, jobs, stream);
    } else {
      if (down) run_weight_pass<E, kWidth, X>(w, splits, 1, stream);
      w.first_job = 1;
      run_weight_pass<E, kWidth, Y>(w, splits, 1, stream);
    }
  }
  if (!(down || up)) return;

  Finish f{op, {partials[0], partials[1]}, d_scales, blocks ? kFinishWarps : 1};
  launch(finish_gradients<E>, int((op.dim * f.warps + kFinishWarps - 1) / kFinishWarps),
         32 * kFinishWarps, 0, stream, f);
  if (!op.d_scale.data || op.channel_scale) return;
  finish_scale<<<1, 256, 0, stream>>>(d_scales, op.dim, op.d_scale);
  check(cudaGetLastError());
}

// Calls run for the dtypes of x and y and the width of the parts that r is cut into. There is one
// width where x or y is wider than the products: the more its bytes cost, the less products do.
template <class E, class Op>
void run(const Op& op, Arena* arena, cudaStream_t stream) {
  if constexpr (sizeof(typename E::T) == 2) {
    const bool wide_x = op.x_dtype == Dtype::float32, wide_y = op.out_dtype == Dtype::float32;
    if (wide_x && wide_y) return run<E, 64, Full, Full>(op, arena, stream);
    if (wide_x) return run<E, 64, Full, E>(op, arena, stream);
    if (wide_y) return run<E, 64, E, Full>(op, arena, stream);
  }
  if (op.bottleneck <= 32) {
    run<E, 32, E, E>(op, arena, stream);
  } else {
    run<E, 64, E, E>(op, arena, stream);
  }
}

}  // namespace fastadapters::cuda

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

// Two blocks should share a processor, so that one computes while the other waits for memory; what
// shared memory they leave goes to the ring.
template <class E, int kWidth, bool kBackward, class X, class Y>
void run_data_pass(DataPass& p, const Device& device, cudaStream_t stream) {
  using L = Layout<E, kWidth, X, Y>;
  const bool extra_x = kBackward && p.down_sums && p.out.data;
  for (int blocks = 2; blocks > 0; --blocks) {
    const int budget =
        std::min(device.shared_per_block, device.shared_per_processor / blocks - 1024);
    for (p.lookahead = kLargestLookahead; p.lookahead > 0; --p.lookahead) {
      p.ring = p.lookahead + 1;
      const int spare = budget - L(p, extra_x).bytes;
      if (spare < 0) continue;
      if (p.keep_tail) p.ring = std::max(p.ring, std::min(p.chunks, p.ring + spare / L::kSlot));
      return launch(data_pass<E, kWidth, kBackward, X, Y>, (p.rows + kRows - 1) / kRows, kThreads,
                    L(p, extra_x).bytes, stream, p);
    }
  }
  p.lookahead = 1;
  p.ring = 2;
  throw std::runtime_error("fastadapters: r = " + std::to_string(p.bottleneck) +
                           " is too large for the CUDA kernels: a block would take " +
                           std::to_string(L(p, extra_x).bytes) + " bytes of shared memory of " +
                           std::to_string(device.shared_per_block));
}

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

template <class E, int kWidth, class X, class Y>
void run(const BottleneckBackward& op, Arena* arena, cudaStream_t stream) {
  DataPass p;
  set_up<E, kWidth>(op, op.channel_scale, arena, stream, &p);
  const Device device = current_device();

  const bool down =
      op.d_down_weight.data || op.d_down_bias.data || op.d_norm_weight.data || op.d_norm_bias.data;
  const bool up = op.d_up_weight.data || op.d_up_bias.data || op.d_scale.data;
  const int64_t width = p.parts * kWidth;
  const int64_t hidden_bytes = p.rows * width * int64_t(sizeof(typename E::T));
  if (up) p.hidden = arena->take<char>(hidden_bytes);
  if (down) p.d_hidden = arena->take<char>(hidden_bytes);

  // The rows are split so that two blocks on each processor share the work.
  const int tiles = (p.rows + kRows - 1) / kRows;
  const int columns = std::max(p.chunks * p.parts * (int(down) + int(up)), 1);
  const int wanted = std::max(2 * device.processors / columns, 1);
  const int tiles_per_split = std::max((tiles + wanted - 1) / wanted, 1);
  const int splits = (tiles + tiles_per_split - 1) / tiles_per_split;
  float* partials[2] = {};
  float* sums[2] = {};
  for (int job = 0; job < 2; ++job) {
    if (!(job == 0 ? down : up)) continue;
    partials[job] = arena->take<float>(splits * op.dim * width * 4);
    sums[job] = arena->take<float>(splits * (job == 0 ? width : op.dim) * 4);
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
    if (op.needs_z()) run_data_pass<E, kWidth, true, X, Y>(p, device, stream);
    if (!(down || up)) return;

    WeightPass w;
    static_cast<Problem&>(w) = p;
    w.dy = p.tail;
    w.hidden = p.hidden;
    w.d_hidden = p.d_hidden;
    w.first_job = down ? 0 : 1;
    w.rows_per_split = tiles_per_split * kRows;
    std::copy(partials, partials + 2, w.partials);
    std::copy(sums, sums + 2, w.sums);
    if (std::is_same_v<X, Y> || !up) {
      run_weight_pass<E, kWidth, X>(w, splits, int(down) + int(up), stream);
    } else {
      if (down) run_weight_pass<E, kWidth, X>(w, splits, 1, stream);
      w.first_job = 1;
      run_weight_pass<E, kWidth, Y>(w, splits, 1, stream);
    }
  }
  if (!(down || up)) return;

  Finish f{op, splits, int(width), {partials[0], partials[1]}, {sums[0], sums[1]}, d_scales};
  launch(finish_gradients<E>, int((op.dim + 7) / 8), 256, 0, stream, f);
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

// Launches the bottleneck's kernels on NVIDIA GPUs, sm_80 and later.
#include <algorithm>

#include "../launch.cuh"
#include "bottleneck.h"
#include "data_pass.cuh"
#include "gradients.cuh"
#include "prepare.cuh"

namespace fastadapters::cuda {
namespace {

// Calls run(element type, width of a part of r).
template <class Run>
auto dispatch(const Bottleneck& op, bool tf32, Run run) {
  const auto with_width = [&](auto element) {
    return op.bottleneck <= 32 ? run(element, std::integral_constant<int, 32>{})
                               : run(element, std::integral_constant<int, 64>{});
  };
  switch (op.dtype) {
    case Dtype::bfloat16:
      return with_width(BFloat16{});
    case Dtype::float16:
      return with_width(Float16{});
    default:
      return tf32 ? with_width(Float32<true>{}) : with_width(Float32<false>{});
  }
}

// Fills in what forward and backward share, and prepares the weights.
template <class E, int kWidth>
cudaError_t set_up(const Bottleneck& op, bool fold_scale, Arena* arena, cudaStream_t stream,
                   Problem* p) {
  constexpr int kSize = sizeof(typename E::T);
  p->rows = int(op.count());
  p->middle = int(op.rows[1]);
  p->inner = int(op.rows[2]);
  p->dim = int(op.dim);
  p->bottleneck = int(op.bottleneck);
  p->chunks = int((op.dim * kSize + kLine - 1) / kLine);
  p->parts = int((op.bottleneck + kWidth - 1) / kWidth);
  p->x = activations(op.rows, op.dtype, op.x);
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
  if (arena->counting) return cudaSuccess;
  p->down = {down ? work.down : static_cast<const char*>(op.down_weight.data), work.down_stride};
  p->up = {up ? work.up : static_cast<const char*>(op.up_weight.data), work.up_stride};
  p->down_sums = norm ? work.down_sums : nullptr;
  p->down_bias = norm ? Vector{work.down_bias, Dtype::float32, true} : vector(op.down_bias);
  if (!(down || up) || p->rows == 0) return cudaSuccess;
  const int blocks = (down ? p->bottleneck : 0) + (up ? (p->dim + kUpRows - 1) / kUpRows : 0);
  return launch(prepare_weights<E>, blocks, 256, 0, stream, work);
}

// Two blocks should share a processor, so that one computes while the other waits for memory; what
// shared memory they leave goes to the ring.
template <class E, int kWidth, bool kBackward>
cudaError_t run_data_pass(DataPass& p, const Device& device, cudaStream_t stream) {
  const bool extra_x = kBackward && p.down_sums && p.out.data;
  for (int blocks = 2; blocks > 0; --blocks) {
    const int budget =
        std::min(device.shared_per_block, device.shared_per_processor / blocks - 1024);
    for (p.lookahead = kLargestLookahead; p.lookahead > 0; --p.lookahead) {
      p.ring = p.lookahead + 1;
      const int spare = budget - Layout<E, kWidth>(p, extra_x).bytes;
      if (spare < 0) continue;
      if (p.keep_tail) p.ring = std::max(p.ring, std::min(p.chunks, p.ring + spare / kPanel));
      const int shared = Layout<E, kWidth>(p, extra_x).bytes;
      return launch(data_pass<E, kWidth, kBackward>, (p.rows + kRows - 1) / kRows, kThreads, shared,
                    stream, p);
    }
  }
  return cudaErrorInvalidConfiguration;
}

template <class E, int kWidth>
cudaError_t forward(const BottleneckForward& op, Arena* arena, cudaStream_t stream) {
  DataPass p;
  cudaError_t error = set_up<E, kWidth>(op, false, arena, stream, &p);
  Device device;
  if (error == cudaSuccess) error = current_device(&device);
  if (error != cudaSuccess || arena->counting || p.rows == 0) return error;
  p.tail = activations(op.rows, op.dtype, op.residual);
  p.out = activations(op.rows, op.dtype, op.y);
  p.add_tail = op.residual.data != nullptr;
  p.keep_tail = op.residual.data == op.x.data &&
                std::equal(op.x.strides, op.x.strides + 3, op.residual.strides);
  return run_data_pass<E, kWidth, false>(p, device, stream);
}

template <class E, int kWidth>
cudaError_t backward(const BottleneckBackward& op, Arena* arena, cudaStream_t stream) {
  DataPass p;
  cudaError_t error = set_up<E, kWidth>(op, op.channel_scale, arena, stream, &p);
  Device device;
  if (error == cudaSuccess) error = current_device(&device);
  if (error != cudaSuccess) return error;

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
  if (arena->counting) return cudaSuccess;

  if (p.rows > 0) {
    p.tail = activations(op.rows, op.dtype, op.dy);
    p.out = activations(op.rows, op.dtype, op.dx);
    p.add_tail = p.keep_tail = op.add_dy;
    p.passes_per_part = down || op.dx.data ? 2 : 1;
    error = run_data_pass<E, kWidth, true>(p, device, stream);
    if (error != cudaSuccess || !(down || up)) return error;

    WeightPass w;
    static_cast<Problem&>(w) = p;
    w.dy = p.tail;
    w.hidden = p.hidden;
    w.d_hidden = p.d_hidden;
    w.first_job = down ? 0 : 1;
    w.rows_per_split = tiles_per_split * kRows;
    std::copy(partials, partials + 2, w.partials);
    std::copy(sums, sums + 2, w.sums);
    const dim3 grid(p.chunks * p.parts, splits, int(down) + int(up));
    using S = Stages<Layout<E, kWidth>>;
    error = launch(weight_pass<E, kWidth>, grid, kThreads, S::kCount * S::kBytes, stream, w);
    if (error != cudaSuccess) return error;
  }
  if (!(down || up)) return cudaSuccess;

  Finish f{op, splits, int(width), {partials[0], partials[1]}, {sums[0], sums[1]}, d_scales};
  error = launch(finish_gradients<E>, int((op.dim + 7) / 8), 256, 0, stream, f);
  if (error != cudaSuccess || !op.d_scale.data || op.channel_scale) return error;
  finish_scale<<<1, 256, 0, stream>>>(d_scales, op.dim, op.d_scale);
  return cudaGetLastError();
}

cudaError_t run(const BottleneckForward& op, bool tf32, Arena* arena, void* stream) {
  return dispatch(op, tf32, [&](auto element, auto width) {
    return forward<decltype(element), width>(op, arena, static_cast<cudaStream_t>(stream));
  });
}

cudaError_t run(const BottleneckBackward& op, bool tf32, Arena* arena, void* stream) {
  return dispatch(op, tf32, [&](auto element, auto width) {
    return backward<decltype(element), width>(op, arena, static_cast<cudaStream_t>(stream));
  });
}

template <class Op>
int64_t workspace(const Op& op) {
  Arena arena;
  run(op, false, &arena, nullptr);
  return arena.used;
}

template <class Op>
int run_in(const Op& op, bool tf32, void* workspace, void* stream) {
  if (op.count() > INT32_MAX - kRows || op.dim > INT32_MAX / 8 || op.bottleneck > INT32_MAX / 8) {
    return cudaErrorInvalidValue;
  }
  Arena arena{static_cast<char*>(workspace), false};
  return run(op, tf32, &arena, stream);
}

}  // namespace
}  // namespace fastadapters::cuda

using namespace fastadapters;

int64_t fastadapters_bottleneck_forward_cuda_workspace(const BottleneckForward* op) {
  return cuda::workspace(*op);
}

int64_t fastadapters_bottleneck_backward_cuda_workspace(const BottleneckBackward* op) {
  return cuda::workspace(*op);
}

int fastadapters_bottleneck_forward_cuda(const BottleneckForward* op, bool tf32, void* workspace,
                                         void* stream) {
  return cuda::run_in(*op, tf32, workspace, stream);
}

int fastadapters_bottleneck_backward_cuda(const BottleneckBackward* op, bool tf32, void* workspace,
                                          void* stream) {
  return cuda::run_in(*op, tf32, workspace, stream);
}

const char* fastadapters_cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

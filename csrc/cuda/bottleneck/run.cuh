// Launches the bottleneck's kernels for products in one dtype.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../launch.cuh"
#include "columns.cuh"
#include "data_pass.cuh"
#include "finish.cuh"
#include "groups.cuh"
#include "prepare.cuh"
#include "shares.cuh"

namespace fastadapters::cuda {

inline Dropout dropout(const int64_t* seed, int stream, double probability) {
  if (!seed || probability <= 0) return {};
  return {seed, stream, dropout_threshold(probability),
          probability < 1 ? float(1 / (1 - probability)) : 0};
}

// Fills in what forward and backward share; how the weights of each of the adapters are to be
// prepared.
template <class E, int kWidth>
Preparation set_up(const Bottleneck& op, int64_t adapters, bool fold_scale, Arena* arena,
                   Problem* p) {
  constexpr int kSize = sizeof(typename E::T);
  p->rows = int(op.count());
  p->middle = int(op.rows[1]);
  p->inner = int(op.rows[2]);
  p->dim = int(op.dim);
  p->out_dim = int(op.out_dim);
  p->bottleneck = int(op.bottleneck);
  p->chunks = int((op.dim * kSize + kLine - 1) / kLine);
  p->out_chunks = int((op.out_dim * kSize + kLine - 1) / kLine);
  p->parts = int((op.bottleneck + kWidth - 1) / kWidth);
  p->width = int(round_up(op.bottleneck, 16));
  p->x = activations(op.rows, op.x_dtype, op.x);
  p->up_bias = vector(op.up_bias);
  p->scale = vector(op.scale);
  p->channel_scale = op.channel_scale;
  p->scale_value = op.scale_value;
  p->norm_eps = op.norm_eps;
  p->activation = op.activation;
  p->input_dropout = dropout(op.seed, 1, op.input_dropout);
  p->dropout = dropout(op.seed, 0, op.dropout);
  p->stats = reinterpret_cast<float2*>(op.stats);

  p->norm = op.norm_weight.data != nullptr;
  const bool folded = p->norm && !p->input_dropout.seed;
  const auto usable = [&](const Parameter& v, int64_t columns) {
    return v.dtype == op.dtype && columns * kSize % 16 == 0 && on_16_bytes(v.data);
  };
  Preparation work;
  work.op = op;
  if (!folded) work.op.norm_weight = work.op.norm_bias = {};
  work.fold_scale = fold_scale;
  work.down_stride = round_up(op.dim * kSize, 16);
  work.up_stride = round_up(op.bottleneck * kSize, 16);
  const bool down = folded || !usable(op.down_weight, op.dim);
  const bool up = fold_scale || !usable(op.up_weight, op.bottleneck);
  work.adapters = int(adapters);
  work.blocks = int((down ? op.bottleneck : 0) + (up ? (op.out_dim + kUpRows - 1) / kUpRows : 0));
  if (down) work.down = arena->take<char>(adapters * op.bottleneck * work.down_stride);
  if (up) work.up = arena->take<char>(adapters * op.out_dim * work.up_stride);
  if (folded) {
    work.down_sums = arena->take<float>(adapters * op.bottleneck * 4);
    work.down_bias = arena->take<float>(adapters * op.bottleneck * 4);
  }
  p->down = {down ? work.down : static_cast<const char*>(op.down_weight.data), work.down_stride};
  p->up = {up ? work.up : static_cast<const char*>(op.up_weight.data), work.up_stride};
  p->down_sums = folded ? work.down_sums : nullptr;
  p->down_bias = folded ? Vector{work.down_bias, Dtype::float32, true} : vector(op.down_bias);
  const bool exact = op.x_dtype != op.dtype;  // the norm computes in x's dtype
  p->norm_weight = {op.norm_weight.data, op.norm_weight.dtype, exact};
  p->norm_bias = {op.norm_bias.data, op.norm_bias.dtype, exact};
  return work;
}

// What has to be done first: the adapters' rows found, the weights prepared.
template <class E>
void begin(const Plan& plan, Preparation work, Problem* p, cudaStream_t stream) {
  if (plan.order) {
    make_plan(plan, stream);
    p->order = plan.order;
    p->tiles = plan.tiles;
    p->splits = plan.splits;
    work.tile_begin = plan.tile_begin;
  }
  const int blocks = work.blocks * work.adapters;
  if (blocks > 0) launch(prepare_weights<E>, blocks, 256, 0, stream, work);
}

// Divides shared memory: two blocks should share a processor, so that one computes while the other
// waits for memory, but one has it where it accumulates dWu; what they leave goes to the ring.
// False if there is too little.
template <class E, int kWidth, bool kBackward, class X, class Y>
bool arrange(DataPass& p, const Device& device) {
  using L = Layout<E, kWidth, X, Y>;
  const bool extra_x = kBackward && p.norm && p.out.data;
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

template <class E, int kWidth, bool kBackward, class X, class Y, bool kGrouped>
void run_data_pass(DataPass& p, int tiles, const Device& device, cudaStream_t stream) {
  if (!arrange<E, kWidth, kBackward, X, Y>(p, device)) {
    throw std::runtime_error("fastadapters: r = " + std::to_string(p.bottleneck) +
                             " is too large for the CUDA kernels: a block would take " +
                             std::to_string(p.shared) + " bytes of shared memory of " +
                             std::to_string(device.shared_per_block));
  }
  launch(data_pass<E, kWidth, kBackward, false, X, Y, kGrouped>, tiles, kThreads, p.shared, stream,
         p);
}

// Whether there is a kernel that accumulates dWu, of one adapter: in 16 bits, where r may be at
// most 32.
template <class E, int kWidth, class X, class Y, bool kGrouped>
constexpr bool kAccumulates = !kGrouped && sizeof(typename E::T) == 2 &&
                              (kWidth == 32 || !std::is_same_v<X, E> || !std::is_same_v<Y, E>);

inline int tiles_of(int rows) { return (rows + kRows - 1) / kRows; }

// Whether forward keeps h in the place of z: where it tells the activation's derivative.
inline bool keeps_h(const Bottleneck& op) {
  return !op.norm_weight.data &&
         (op.activation == Activation::identity || op.activation == Activation::relu);
}

template <class E, int kWidth, class X, class Y, bool kGrouped>
void run(const BottleneckForward& op, const Groups& groups, Arena* arena, cudaStream_t stream) {
  DataPass p;
  const Preparation work = set_up<E, kWidth>(op, groups.adapters, false, arena, &p);
  Plan plan;
  if constexpr (kGrouped) plan = take_plan(groups, p.rows, 0, arena);
  const bool needs_stats = p.norm && p.input_dropout.seed;
  if (needs_stats && !p.stats) p.stats = arena->take<float2>(p.rows * int64_t(sizeof(float2)));
  if (arena->counting || p.rows == 0) return;
  begin<E>(plan, work, &p, stream);
  if (needs_stats) {
    launch(row_stats<X>, (p.rows + 7) / 8, 256, 0, stream, static_cast<const Problem&>(p));
  }
  p.tail = activations(op.rows, op.out_dtype, op.residual);
  p.out = activations(op.rows, op.out_dtype, op.y);
  p.z = static_cast<char*>(op.z);
  p.keeps_h = keeps_h(op);
  p.add_tail = op.residual.data != nullptr;
  p.keep_tail = op.residual.data == op.x.data && op.dim == op.out_dim &&
                op.x_dtype == op.out_dtype && !p.input_dropout.seed &&
                std::equal(op.x.strides, op.x.strides + 3, op.residual.strides);
  run_data_pass<E, kWidth, false, X, Y, kGrouped>(p, kGrouped ? plan.tile_count : tiles_of(p.rows),
                                                  current_device(), stream);
}

template <class E, int kWidth, class S, bool kGrouped>
void run_weight_pass(WeightPass p, int splits, bool down, bool up, cudaStream_t stream) {
  using Stage = Stages<E, kWidth, S>;
  p.down_blocks = down ? p.chunks * p.parts : 0;
  p.mask_blocks = down && p.partials[kMasks].splits ? p.chunks * p.parts : 0;
  const int blocks = p.down_blocks + p.mask_blocks + (up ? p.out_chunks * p.parts : 0);
  if (blocks == 0) return;
  launch(weight_pass<E, kWidth, S, kGrouped>, dim3(blocks, splits), kThreads,
         Stage::kCount * Stage::kBytes, stream, p);
}

// Columns of dWu where it is accumulated.
inline int units(const BottleneckBackward& op) { return int(round_up(op.bottleneck, 8)); }

// In how many blocks the data pass accumulates dWu, or 0: it does where shared memory has room for
// [D_out, r] and the partial sums are fewer bytes than the dy that a pass of its own would read.
template <class E, int kWidth, class X, class Y, bool kGrouped>
int accumulating_blocks(const BottleneckBackward& op, DataPass p, const Device& device) {
  constexpr bool kThere = kAccumulates<E, kWidth, X, Y, kGrouped>;
  const bool wanted = op.needs_dz() && (op.d_up_weight.data || op.d_scale.data);
  if (!kThere || !wanted || op.norm_weight.data || op.bottleneck > 32) return 0;
  const int64_t tiles = tiles_of(p.rows);
  const int64_t tiles_per_block =
      std::max<int64_t>(round_up(tiles, device.processors) / device.processors, 1);
  const int64_t blocks = (tiles + tiles_per_block - 1) / tiles_per_block;
  p.units = units(op);
  const int64_t saved = tiles * kRows * int64_t(sizeof(typename Y::T));
  if (saved <= blocks * p.units * 8 || !arrange<E, kWidth, true, X, Y>(p, device)) return 0;
  return int(blocks);
}

// Whether there is a kernel that makes dx beside the gradients of the parameters, and whether it is
// worth while: see columns.cuh.
template <class E, class X, class Y, bool kGrouped>
constexpr bool kHasColumns =
    !kGrouped && sizeof(typename E::T) == 2 && std::is_same_v<X, E> && std::is_same_v<Y, E>;

template <class E, class X, class Y, bool kGrouped>
bool by_columns(const BottleneckBackward& op, const DataPass& p, const Device& device) {
  const int64_t under_way = 2 * int64_t(device.processors) * kRows * op.dim * 2;
  return kHasColumns<E, X, Y, kGrouped> && op.add_dy && op.dx.data && op.d_down_weight.data &&
         (op.d_up_weight.data || op.d_scale.data) && p.parts == 1 && !p.norm &&
         !p.input_dropout.seed && under_way > device.l2;
}

template <class E, int kWidth, class X, class Y, bool kGrouped>
void run(const BottleneckBackward& op, const Groups& groups, Arena* arena, cudaStream_t stream) {
  DataPass p;
  const int64_t adapters = groups.adapters;
  const Preparation work = set_up<E, kWidth>(op, adapters, op.channel_scale, arena, &p);
  const Device device = current_device();

  const bool down =
      op.d_down_weight.data || op.d_down_bias.data || op.d_norm_weight.data || op.d_norm_bias.data;
  const bool up = op.d_up_weight.data || op.d_up_bias.data || op.d_scale.data;
  const int blocks = accumulating_blocks<E, kWidth, X, Y, kGrouped>(op, p, device);
  const bool columns = !blocks && by_columns<E, X, Y, kGrouped>(op, p, device);
  const int64_t hidden_bytes = int64_t(p.rows) * p.width * int64_t(sizeof(typename E::T));
  // h is taken from where forward has kept it, if its rows start on 16 bytes.
  const bool kept = keeps_h(op) && op.z && on_16_bytes(op.z) &&
                    op.bottleneck * int64_t(sizeof(typename E::T)) % 16 == 0;
  if (up && !blocks && !kept) p.hidden = arena->take<char>(hidden_bytes);
  if (down) p.d_hidden = arena->take<char>(hidden_bytes);

  // The rows are split so that two blocks on each processor share the work.
  const int tiles = tiles_of(p.rows);
  int shares = 1;
  if (!kGrouped && !blocks && !columns && (down || up) && op.needs_z()) {
    const int64_t spared = (up && op.needs_dz() ? op.out_dim * int64_t(sizeof(typename Y::T)) : 0) +
                           (down && p.norm ? op.dim * int64_t(sizeof(typename X::T)) : 0);
    shares = count_shares<X, Y>(p, spared, device);
  }
  const int tiles_per_share = (tiles + shares - 1) / shares;
  const bool masks =
      p.input_dropout.seed && (op.d_norm_bias.data || (op.norm_bias.data && op.d_down_weight.data));
  const int chunks = (down ? p.chunks : 0) + (masks ? p.chunks : 0) +
                     (up && !blocks && !columns ? p.out_chunks : 0);
  const int wanted = std::max(2 * device.processors / std::max(chunks * p.parts, 1), 1);
  const int tiles_per_split = std::max((tiles_per_share + wanted - 1) / wanted, 1);
  Plan plan;
  if constexpr (kGrouped) plan = take_plan(groups, p.rows, tiles_per_split, arena);
  const int splits =
      kGrouped ? plan.split_count : (tiles_per_share + tiles_per_split - 1) / tiles_per_split;
  Partial partials[kJobs];
  const auto take = [&](Job job, int count, int64_t dim, int width, int64_t sums) {
    partials[job] = {count, width, arena->take<float>(count * dim * width * 4),
                     arena->take<float>(count * sums * 4)};
  };
  if (down) take(kDown, splits, op.dim, p.width, p.width);
  if (masks) take(kMasks, splits, op.dim, p.width, 0);
  if (up && !blocks) take(kUp, splits, op.out_dim, p.width, op.out_dim);
  if (blocks) take(kUp, blocks, op.out_dim, units(op), op.out_dim);
  float* const d_scales = arena->take<float>(adapters * op.out_dim * 4);
  if (arena->counting) return;

  if (p.rows > 0) {
    begin<E>(plan, work, &p, stream);
    p.tail = activations(op.rows, op.out_dtype, op.dy);
    const Activations dx = activations(op.rows, op.x_dtype, op.dx);
    if (!columns) p.out = dx;
    p.add_tail = op.add_dy;
    p.keep_tail = !columns && op.add_dy && !(p.norm && p.input_dropout.seed);
    p.z = static_cast<char*>(op.z);
    p.keeps_h = keeps_h(op);
    p.read_x = p.norm;
    p.read_tail = op.needs_dz();
    if constexpr (kAccumulates<E, kWidth, X, Y, kGrouped>) {
      if (blocks) {
        p.units = units(op);
        p.up_products = partials[kUp].products;
        p.up_sums = partials[kUp].sums;
        arrange<E, kWidth, true, X, Y>(p, device);
        launch(data_pass<E, kWidth, true, true, X, Y, false>, blocks, kThreads, p.shared, stream,
               p);
      }
    }
    WeightPass w;
    static_cast<Problem&>(w) = p;
    w.dy = p.tail;
    w.hidden = kept ? p.z : p.hidden;
    w.hidden_width = kept ? p.bottleneck : p.width;
    w.d_hidden = p.d_hidden;
    w.rows_per_split = tiles_per_split * kRows;
    std::copy(partials, partials + kJobs, w.partials);
    for (int share = 0; share < shares; ++share) {
      p.first_tile = share * tiles_per_share;
      const int count =
          kGrouped ? plan.tile_count : std::min(tiles_per_share, tiles - p.first_tile);
      if (!blocks && (op.needs_dz() || (op.needs_z() && !kept))) {
        run_data_pass<E, kWidth, true, X, Y, kGrouped>(p, count, device, stream);
      }
      w.begin_row = p.first_tile * kRows;
      w.end_row = std::min(w.begin_row + count * kRows, p.rows);
      w.add = share > 0;
      if (columns || !(down || up)) continue;
      if (std::is_same_v<X, Y> || !up || blocks) {
        run_weight_pass<E, kWidth, X, kGrouped>(w, splits, down, up && !blocks, stream);
      } else {
        run_weight_pass<E, kWidth, X, kGrouped>(w, splits, down, false, stream);
        run_weight_pass<E, kWidth, Y, kGrouped>(w, splits, false, true, stream);
      }
    }
    if (columns) {
      if constexpr (kHasColumns<E, X, Y, kGrouped>) {
        ColumnPass c;
        static_cast<WeightPass&>(c) = w;
        c.dx = dx;
        launch(column_pass<E, kWidth>, dim3(p.chunks, splits), kThreads,
               ColumnStages<E, kWidth>::kShared, stream, c);
      }
    }
  }
  if (!(down || up) || adapters == 0) return;

  Finish f{op, {}, d_scales, 0, 0, blocks ? kFinishWarps : 1};
  std::copy(partials, partials + kJobs, f.partials);
  f.down_blocks = down ? (p.dim + kFinishWarps - 1) / kFinishWarps : 0;
  f.up_blocks = up ? (p.out_dim * f.warps + kFinishWarps - 1) / kFinishWarps : 0;
  if (p.rows > 0) f.split_begin = plan.split_begin;
  launch(finish_gradients<E>, int(adapters) * (f.down_blocks + f.up_blocks), 32 * kFinishWarps, 0,
         stream, f);
  if (!op.d_scale.data || op.channel_scale) return;
  finish_scale<<<int(adapters), 256, 0, stream>>>(d_scales, op.out_dim, op.d_scale);
  check(cudaGetLastError());
}

// Calls run for the dtypes of x and y and the width of the parts that r is cut into. There is one
// width where x or y is wider than the products, and in 16 bits for rows of several adapters: the
// more its bytes cost, the less products do.
template <class E, bool kGrouped, class Op>
void run(const Op& op, const Groups& groups, Arena* arena, cudaStream_t stream) {
  constexpr bool kHalf = sizeof(typename E::T) == 2;
  if constexpr (kHalf) {
    const bool wide_x = op.x_dtype == Dtype::float32, wide_y = op.out_dtype == Dtype::float32;
    if (wide_x && wide_y) return run<E, 64, Full, Full, kGrouped>(op, groups, arena, stream);
    if (wide_x) return run<E, 64, Full, E, kGrouped>(op, groups, arena, stream);
    if (wide_y) return run<E, 64, E, Full, kGrouped>(op, groups, arena, stream);
  }
  if constexpr (!(kHalf && kGrouped)) {
    if (op.bottleneck <= 32) return run<E, 32, E, E, kGrouped>(op, groups, arena, stream);
  }
  run<E, 64, E, E, kGrouped>(op, groups, arena, stream);
}

}  // namespace fastadapters::cuda

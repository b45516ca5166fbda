// The launches of the head, in order.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention.cuh"
#include "pair.cuh"
#include "stage.cuh"

namespace fastadapters::cuda::head {

// What the launchers know of a call.
struct Shape {
  int C, B, D, E, H, d, R, padded, rows, first_width;  // of the down-sampler's first layer
  float scale;                                         // of the queries
  bool two_down;

  explicit Shape(const Problem& p)
      : C(p.texts),
        B(p.items),
        D(p.dim),
        E(p.width),
        H(p.heads),
        d(p.depth),
        R(p.rank),
        padded(p.padded),
        rows(p.rows),
        first_width(int(p.op.down_hidden ? p.op.down_hidden : p.op.width)),
        scale(1 / std::sqrt(float(p.depth))),
        two_down(p.op.down_hidden != 0) {}
};

// A part of y: queries 0, keys 1, values 2, head by head.
inline Operand projected(const Problem& p, bool items, int part) {
  const float* const y = p.s.y + (items ? int64_t(p.texts) * 3 * p.width : 0) + part * p.width;
  return by_head(matrix(y, items ? p.items : p.texts, p.depth, 3 * p.width), p.depth);
}

inline Operand attended_texts(const Problem& p) {
  return by_head(matrix(p.s.attended, p.texts, p.depth, p.width), p.depth);
}

// What an item's attention gave, head by head; without data if it sees nothing.
inline Operand attended_items(const Problem& p) {
  const bool texts = sees(p.op, 1, 0), itself = sees(p.op, 1, 1);
  if (itself && !texts) return projected(p, true, 2);
  const float* const from = itself  ? p.s.merged
                            : texts ? p.s.attended + int64_t(p.texts) * p.width
                                    : nullptr;
  return by_head(matrix(from, p.items, p.depth, p.width), p.depth);
}

// The attention's output where it depends on one index.
inline Operand attended_alone(const Problem& p) {
  if (p.form == Form::text) return attended_texts(p);
  Operand values = projected(p, true, 2);
  if (!sees(p.op, 0, 1)) values.data = nullptr;
  return values;
}

inline Operand all_heads(Operand o, int heads) {
  o.columns *= heads;
  o.batch = 0;
  return o;
}

inline Operand inner(const Problem& p) {
  return by_head(matrix(p.inner_weight.data, p.inner_weight.dtype, p.rank, p.depth, p.width),
                 p.depth);
}

inline Operand last_layer(const Problem& p) { return with_column(matrix(p.w, p.dim, p.rank), p.c); }

inline void run_attention(const Problem& p, int first, int end, cudaStream_t stream) {
  const AttentionForward a{p, first, end};
  const dim3 grid((end - first + kRows - 1) / kRows, p.heads, parts_of(p.depth));
  launch(attend, grid, kThreads, shared_bytes(1, p.depth), stream, a);
}

// Warps of a block of the pair stage, and its shared memory: two blocks on a processor if that can
// be; none if even one warp's vectors do not fit.
struct PairShape {
  int warps = 4, text_tiles;
  int64_t floats = 0;
  bool shared = true;

  PairShape(const Problem& p, bool backward, const Device& device) {
    const auto need = [&](int w) {
      const int64_t vectors = (backward ? 2 * p.padded + 3 * p.heads + 3 : p.padded + 2 * p.heads);
      return vectors * (64 * w + 1) + (backward ? w * p.padded : 0);
    };
    const int64_t limit = device.shared_per_block;
    const int64_t half = std::min<int64_t>(limit, device.shared_per_processor / 2 - 1024) - 4096;
    while (warps > 1 && need(warps) * 4 > half) warps /= 2;
    shared = need(warps) * 4 <= limit - 4096;
    if (!shared) warps = 4;
    floats = round_up(need(warps), 4);
    text_tiles = (p.texts + 2 * warps - 1) / (2 * warps);
  }
};

inline void forward(const MultimodalForward& op, Arena* arena, cudaStream_t stream) {
  float* state = op.state;
  if (!state) {
    Numbers n;
    lay_out(op, &n);
    state = arena->take<float>(n.used * 4);
  }
  Problem p = problem_of(op, state);
  p.logits = op.logits;
  const Device device = current_device();
  PairForward pair;
  const PairShape shape(p, false, device);
  pair.scratch_size = shape.floats;
  pair.scratch = shape.shared || p.form != Form::pair
                     ? nullptr
                     : arena->take<float>(item_tiles(p) * shape.text_tiles * shape.floats * 4);
  double* const factor =
      factor_bytes(p) > kLargestFactor ? arena->take<double>(factor_bytes(p)) : nullptr;
  if (arena->counting || p.items == 0) return;
  pair.p = p;
  const Shape n(p);
  const State& s = p.s;
  const MultimodalParameters& w = op.parameters;
  const Activation between = p.gelu ? Activation::gelu : Activation::identity;

  const auto down = [&](const Features& from, int first, int rows) {
    Product a =
        product(rows, n.first_width,
                {{matrix(from, rows, n.D), matrix(w.down_weight, n.first_width, n.D), n.D}});
    const int64_t at = int64_t(first) * n.first_width;
    a.out = {(n.two_down ? s.hidden : s.x) + at};
    a.active = n.two_down ? s.active + at : nullptr;
    a.activation = op.down_activation;
    a.out_stride = n.first_width;
    a.bias = w.down_bias;
    return a;
  };
  Builder first(p);
  first.add(down(op.text, 0, n.C));
  first.add(down(op.image, n.C, n.B));
  first.add(RowKind::text_length, n.C);
  if (p.gelu) {
    Product a =
        product(n.R, n.E,
                {{matrix(w.up_weight, n.R, n.E), transposed(matrix(w.out_weight, n.E, n.E)), n.E}});
    a.out = {s.inner_weight}, a.out_stride = n.E;
    first.add(a);
    first.add(RowKind::inner_bias, n.R);
  }
  if (p.form != Form::none) first.add(RowKind::gram, (n.R + 1) * ((n.R + 32) / 32));
  first.run(stream);

  Builder second(p), third(p);
  if (n.two_down) {
    Product a = product(n.rows, n.E,
                        {{matrix(s.active, n.rows, n.first_width, n.first_width),
                          matrix(w.down_weight_2, n.E, n.first_width), n.first_width}});
    a.out = {s.x}, a.out_stride = n.E, a.bias = w.down_bias_2;
    second.add(a);
  }
  Product y = product(n.rows, 3 * n.E,
                      {{matrix(s.x, n.rows, n.E, n.E), matrix(w.in_weight, 3 * n.E, n.E), n.E}});
  y.out = {s.y}, y.out_stride = 3 * n.E, y.bias = w.in_bias;
  y.scaled_columns = n.E, y.column_scale = n.scale;
  (n.two_down ? third : second).add(y);
  if (p.form != Form::none) {
    Product a = product(n.C, n.R, {{matrix(op.text, n.C, n.D), transposed(last_layer(p)), n.D}});
    a.out = {s.text_w}, a.out_stride = a.stored = n.padded, a.row_scale = s.text_scale;
    a.tail = {s.text_c};
    second.add(a);
    second.stage.factorise = true;
    second.stage.factor = factor;
  }
  second.run(stream);
  third.run(stream);

  const int first_row = first_query(p), end_row = end_query(p);
  if (first_row < end_row) run_attention(p, first_row, end_row, stream);

  Builder fourth(p);
  const auto hidden = [&](int rows, const Operand& from, float* z, float* e) {
    Product a = product(rows, n.R, {{all_heads(from, n.H), all_heads(inner(p), n.H), n.E}});
    a.out = {z}, a.active = e, a.activation = between;
    a.out_stride = a.stored = n.padded, a.bias = p.inner_bias;
    return a;
  };
  if (p.form == Form::pair) {
    Product text = product(n.C, n.R, {{attended_texts(p), inner(p), n.d}});
    text.batches = n.H;
    text.out = {s.from_text}, text.out_stride = n.H * n.padded, text.out_batch = n.padded;
    text.stored = n.padded, text.bias = p.inner_bias, text.bias_scale = 1.0f / n.H;
    fourth.add(text);
    Product item = product(n.padded, n.B, {{inner(p), projected(p, true, 2), n.d}});
    item.batches = n.H;
    item.out = {s.from_item}, item.out_stride = n.B, item.out_batch = int64_t(n.padded) * n.B;
    item.bias = p.inner_bias, item.bias_scale = 1.0f / n.H, item.bias_by_row = true;
    item.bias_size = n.R;
    fourth.add(item);
    Product odds = product(n.C, n.B, {{projected(p, false, 0), projected(p, true, 1), n.d}});
    odds.batches = n.H;
    odds.out = {s.odds}, odds.out_stride = n.B, odds.out_batch = int64_t(n.C) * n.B;
    odds.bias = {s.lse}, odds.bias_batch = n.rows, odds.bias_scale = -1, odds.bias_by_row = true;
    odds.constant = op.bias[0][1] - op.bias[0][0];
    fourth.add(odds);
  } else if (p.form != Form::none) {
    fourth.add(hidden(hidden_rows(p), attended_alone(p), s.z, s.e));
  }
  if (p.adapts_item) fourth.add(hidden(n.B, attended_items(p), s.item_z, s.item_e));
  fourth.run(stream);

  launch(rows_forward, n.B + (p.form == Form::text ? n.C : 0), kItemThreads, 0, stream, p);

  Builder fifth(p);
  const auto pairs = [&](const Operand& left, const Operand& right, int depth, float* out) {
    Product a = product(n.C, n.B, {{left, right, depth}});
    a.out = {out}, a.out_stride = n.B;
    return a;
  };
  Product similarity =
      pairs(matrix(op.text, n.C, n.D), matrix(s.unit, n.B, n.D, n.D), n.D, s.similarity);
  similarity.row_scale = s.text_scale;
  fifth.add(similarity);
  if (p.form == Form::item) {
    Product a = pairs(matrix(s.text_w, n.C, n.R, n.padded), matrix(s.e, n.B, n.R, n.padded), n.R,
                      s.text_dot);
    a.bias = {s.text_c}, a.bias_by_row = true;
    fifth.add(a);
  } else if (p.form == Form::text) {
    Product a = pairs(matrix(s.e, n.C, n.R, n.padded), transposed(matrix(s.item_w, n.R, n.B, n.B)),
                      n.R, s.item_dot);
    a.bias = {s.item_c};
    fifth.add(a);
  }
  fifth.run(stream);

  const int grid = item_tiles(p) * (p.form == Form::pair ? shape.text_tiles : (n.C + 7) / 8);
  if (p.form != Form::pair) {
    launch(mix_forward, grid, 128, 0, stream, p);
  } else if (shape.shared) {
    launch(pair_forward<true>, grid, 32 * shape.warps, int(shape.floats * 4), stream, pair);
  } else {
    launch(pair_forward<false>, grid, 32 * shape.warps, 0, stream, pair);
  }
}

}  // namespace fastadapters::cuda::head

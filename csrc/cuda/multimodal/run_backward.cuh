// The launches of backward, in order.
#pragma once

#include "attention_backward.cuh"
#include "pair_backward.cuh"
#include "run.cuh"
#include "slabs.cuh"

namespace fastadapters::cuda::head {

inline void run_attention_backward(const AttentionBackward& a, cudaStream_t stream) {
  const Problem& p = a.p;
  const int tiles = (a.end - a.first + kRows - 1) / kRows + (p.texts + kRows - 1) / kRows;
  const dim3 grid(tiles, p.heads, parts_of(p.depth));
  launch(attend_backward, grid, kThreads, shared_bytes(2, p.depth), stream, a);
}

inline void clear(const Parameter& p, int64_t count, cudaStream_t stream) {
  if (p.data) check(cudaMemsetAsync(p.data, 0, count * size_of(p.dtype), stream));
}

// Without items nothing depends on anything.
inline void clear_all(const MultimodalBackward& op, cudaStream_t stream) {
  const MultimodalParameters& g = op.gradients;
  const int64_t D = op.dim, E = op.width, first = op.down_hidden ? op.down_hidden : E;
  const int64_t last = op.up_hidden ? op.up_hidden : D;
  clear({op.d_text.data, op.d_text.dtype}, op.texts * D, stream);
  clear(g.down_weight, first * D, stream), clear(g.down_bias, first, stream);
  clear(g.down_weight_2, E * first, stream), clear(g.down_bias_2, E, stream);
  clear(g.in_weight, 3 * E * E, stream), clear(g.in_bias, 3 * E, stream);
  clear(g.out_weight, E * E, stream), clear(g.out_bias, E, stream);
  clear(g.up_weight, last * E, stream), clear(g.up_bias, last, stream);
  clear(g.up_weight_2, D * last, stream), clear(g.up_bias_2, D, stream);
  clear(g.blend, 1, stream), clear(g.logit_scale, 1, stream);
}

inline void backward(const MultimodalBackward& op, Arena* arena, cudaStream_t stream) {
  Problem p = problem_of(op, op.state);
  p.d_logits = op.d_logits;
  const Device device = current_device();
  const Shape n(p);
  const State& s = p.s;
  const MultimodalParameters &w = op.parameters, &out = op.gradients;
  const int processors = device.processors;
  const bool pairs = p.form == Form::pair, alone = p.form == Form::item || p.form == Form::text;
  const Parameter& d_w = p.gelu ? out.up_weight_2 : out.up_weight;
  const Parameter& d_c = p.gelu ? out.up_bias_2 : out.up_bias;

  // What is wanted: gradients of the last layer, of `inner` and what it is composed of, ...
  const bool of_last = d_w.data || d_c.data;
  const bool of_composed =
      p.gelu && (out.out_weight.data || out.out_bias.data || out.up_weight.data);
  const bool of_inner = of_composed || (p.gelu ? out.up_bias.data != nullptr
                                               : out.out_weight.data || out.out_bias.data);
  const bool of_in = out.in_weight.data || out.in_bias.data;
  const bool of_first = out.down_weight.data || out.down_bias.data;
  const bool of_second = n.two_down && (out.down_weight_2.data || out.down_bias_2.data);
  const bool of_hidden = of_first || op.d_text.data || op.d_image.data;
  const bool of_x = of_hidden || of_second, of_y = of_x || of_in;
  const bool beyond = of_y || of_inner || of_last || out.blend.data;

  const auto floats = [&](int64_t count) { return arena->take<float>(count * 4); };
  const int64_t C = n.C, B = n.B, E = n.E, padded = n.padded, H = n.H;

  // ---- Memory
  Gradients g;
  g.d_similarity = floats(C * B);
  PairBackward pair;
  const PairShape shape(p, true, device);
  const int across = item_tiles(p), mix_tiles = (n.C + 7) / 8;
  const int wanted = std::max(1, 2 * processors / std::max(across, 1));
  pair.tiles_per_block = (shape.text_tiles + wanted - 1) / wanted;
  const int text_blocks = (shape.text_tiles + pair.tiles_per_block - 1) / pair.tiles_per_block;
  const int blocks = across * (pairs ? text_blocks : mix_tiles);
  float *d_odds = nullptr, *d_from_text = nullptr, *d_from_item = nullptr;
  const int64_t form_size = (n.R + 1) * padded + 1;
  pair.scratch = nullptr, pair.scratch_size = shape.floats;
  if (pairs) {
    d_odds = floats(H * C * B);
    d_from_text = floats(C * H * padded), d_from_item = floats(B * H * padded);
    pair.d_from_text = floats(across * C * H * padded);
    pair.d_text_w = floats(across * C * padded), pair.d_text_c = floats(across * C);
    pair.d_from_item = floats(text_blocks * B * H * padded);
    pair.d_item_w = floats(text_blocks * B * padded), pair.d_item_c = floats(text_blocks * B);
    pair.d_square_form = floats(blocks * form_size);
    if (!shape.shared) pair.scratch = floats(blocks * shape.floats);
  }
  float* const d_scales = floats(blocks);
  float* const d_blends = floats(blocks + B);  // those of items behind those of blocks
  g.d_blend = d_blends + blocks;
  const int alone_rows = hidden_rows(p);
  const int alone_depth = p.form == Form::item ? n.C : n.B;
  if (alone) {
    g.d_square = floats(C * B), g.d_text_dot = floats(C * B), g.d_item_dot = floats(C * B);
    g.e_slabs = std::min(splits_of(tiles_of(alone_rows, n.R), alone_depth, processors), 8);
    g.square_sums = floats(g.e_slabs * alone_rows), g.dot_sums = floats(g.e_slabs * alone_rows);
    g.e_sums = floats(g.e_slabs * alone_rows * padded);
    g.d_e_z = floats(alone_rows * padded), g.weighted_e = floats(alone_rows * padded);
    g.weights = floats(alone_rows);
  }
  g.d_text_w = floats(C * padded), g.d_text_c = floats(C);
  g.d_item_w = floats(B * padded), g.d_item_c = floats(B);
  g.d_square_form = floats(form_size);
  g.unit_slabs = std::min(splits_of(tiles_of(n.B, n.D), n.C, processors), 8);
  g.d_unit = floats(g.unit_slabs * B * n.D);
  g.d_item = floats(B * n.D), g.d_u = floats(B * n.D);
  g.d_item_z = floats(B * padded), g.d_merged = floats(B * E);
  g.d_odds_sum = floats(H * C);
  g.key_slabs = std::min(splits_of(tiles_of(n.B, n.d) * n.H, n.C, processors), 8);
  g.d_keys = floats(g.key_slabs * B * E), g.d_values = floats(B * E);
  g.d_out = floats(n.rows * E), g.delta = floats(H * n.rows);
  g.d_y = floats(n.rows * 3 * E), g.d_x = floats(n.rows * E);
  g.d_hidden = floats(n.rows * op.down_hidden);
  g.coefficient = floats(C);
  const int all = n.C + 2 * n.B + alone_rows;
  const Slabs inner_slabs(arena, of_inner, n.R, n.E, all, processors, n.H);
  const Slabs in_slabs(arena, of_in, 3 * n.E, n.E, n.rows, processors);
  const Slabs last_slabs(arena, of_last, n.D, n.R, all + n.R, processors);
  const Slabs second_slabs(arena, of_second, n.E, n.first_width, n.rows, processors);
  const Slabs first_slabs(arena, of_first, n.first_width, n.D, n.rows, processors);
  float *d_inner = nullptr, *d_inner_bias = nullptr;
  if (of_composed) d_inner = floats(int64_t(n.R) * E), d_inner_bias = floats(n.R);
  if (arena->counting) return;
  if (p.items == 0) return clear_all(op, stream);

  // ---- Pairs
  if (pairs) {
    pair.p = p;
    pair.d_similarity = g.d_similarity, pair.d_odds = d_odds;
    pair.d_scale = d_scales, pair.d_blend = d_blends;
    if (shape.shared) {
      launch(pair_backward<true>, blocks, 32 * shape.warps, int(shape.floats * 4), stream, pair);
    } else {
      launch(pair_backward<false>, blocks, 32 * shape.warps, 0, stream, pair);
    }
  } else {
    const MixBackward mix{p,        g.d_similarity, g.d_square, g.d_text_dot, g.d_item_dot,
                          d_scales, d_blends};
    launch(mix_backward, blocks, 128, 0, stream, mix);
  }

  // ---- Sums over pairs
  const Rows rows{p, g, n.scale};
  {
    Builder b(p);
    b.add(Sum{d_scales, blocks, 1, 1, 1, out.logit_scale});
    const auto total = [&](const float* from, int slabs, int64_t size, float* to) {
      b.add(Sum{from, slabs, size, size, 1, {to}});
    };
    if (beyond && pairs) {
      total(pair.d_from_text, across, C * H * padded, d_from_text);
      total(pair.d_text_w, across, C * padded, g.d_text_w);
      total(pair.d_text_c, across, C, g.d_text_c);
      total(pair.d_from_item, text_blocks, B * H * padded, d_from_item);
      total(pair.d_item_w, text_blocks, B * padded, g.d_item_w);
      total(pair.d_item_c, text_blocks, B, g.d_item_c);
      total(pair.d_square_form, blocks, form_size, g.d_square_form);
    }
    if (beyond && alone) {
      const bool by_item = p.form == Form::item;
      const auto over = [&](const float* m) {  // [C, B], its rows the rows of e
        const Operand o = matrix(m, n.C, n.B, n.B);
        return by_item ? transposed(o) : o;
      };
      Operand nothing = with_ones(transposed(matrix(g.d_square, alone_depth, 0, 0)));
      for (int i = 0; i < 2; ++i) {
        const float* const from = i == 0 ? g.d_square : by_item ? g.d_item_dot : g.d_text_dot;
        Product a = product(alone_rows, 0, {{over(from), nothing, alone_depth}});
        a.tail = {i == 0 ? g.square_sums : g.dot_sums};
        a.tail_slab = alone_rows, a.splits = g.e_slabs;
        b.add(a);
      }
      const Operand e = matrix(s.e, alone_rows, n.R, n.padded);
      const Operand other = by_item ? transposed(matrix(s.text_w, n.C, n.R, n.padded))
                                    : matrix(s.item_w, n.R, n.B, n.B);
      Product a = product(alone_rows, n.R,
                          {{over(by_item ? g.d_text_dot : g.d_item_dot), other, alone_depth}});
      a.out = {g.e_sums}, a.out_stride = a.stored = n.padded;
      a.out_slab = alone_rows * padded, a.splits = g.e_slabs;
      b.add(a);
      // The other index's part of the two dots.
      const Operand m = matrix(by_item ? g.d_text_dot : g.d_item_dot, n.C, n.B, n.B);
      Product c = product(by_item ? n.C : n.B, n.R,
                          {{by_item ? m : transposed(m), with_ones(transposed(e)), alone_rows}});
      c.out = {by_item ? g.d_text_w : g.d_item_w}, c.out_stride = c.stored = n.padded;
      c.tail = {by_item ? g.d_text_c : g.d_item_c};
      c.row_scale = by_item ? s.text_scale : nullptr;
      b.add(c);
    }
    b.run(stream);
    if (!beyond) return;
    if (alone) launch(hidden_backward, alone_rows, kItemThreads, 0, stream, rows);
  }

  // ---- Unit rows of items, and what the attention's outputs get from the pairs
  const int first_row = first_query(p), end_row = end_query(p);
  const bool attends = first_row < end_row;
  {
    Builder b(p, g);
    Product unit = product(n.B, n.D,
                           {{transposed(matrix(g.d_similarity, n.C, n.B, n.B)),
                             transposed(matrix(op.text, n.C, n.D)), n.C},
                            {with_column(matrix(g.d_item_w, n.B, n.R, n.padded), {g.d_item_c}),
                             last_layer(p), p.form == Form::none ? 0 : n.R + 1}});
    unit.out = {g.d_unit}, unit.out_stride = n.D;
    unit.splits = g.unit_slabs, unit.out_slab = B * n.D;
    b.add(unit);
    if (pairs && of_y) {
      const auto through = [&](float* from, int count, float* to) {
        const Operand left = by_head(matrix(from, count, n.R, n.H * n.padded), n.padded);
        Product a = product(count, n.d, {{left, transposed(inner(p)), n.R}});
        a.batches = n.H, a.out = {to}, a.out_stride = n.E, a.out_batch = n.d;
        b.add(a);
      };
      through(d_from_text, n.C, g.d_out);
      through(d_from_item, n.B, g.d_values);
      const Operand odds = by_head(matrix(d_odds, n.C, n.B, n.B), C * B);
      Product q = product(n.C, n.d, {{odds, with_ones(transposed(projected(p, true, 1))), n.B}});
      q.batches = n.H, q.out = {g.d_y}, q.out_stride = 3 * n.E, q.out_batch = n.d;
      q.scaled_columns = n.d, q.column_scale = n.scale;
      q.tail = {g.d_odds_sum}, q.tail_batch = C;
      b.add(q);
      Product k = product(n.B, n.d, {{transposed(odds), transposed(projected(p, false, 0)), n.C}});
      k.batches = n.H, k.out = {g.d_keys}, k.out_stride = n.E, k.out_batch = n.d;
      k.splits = g.key_slabs, k.out_slab = B * E;
      b.add(k);
    } else if (of_y) {
      Product zeros = product(n.C, attends ? n.E : 3 * n.E, {});
      zeros.out = {g.d_y}, zeros.out_stride = 3 * n.E;
      b.add(zeros);
    }
    if (alone) {
      const Operand e = matrix(s.e, alone_rows, n.R, n.padded);
      const Operand weighted =
          with_column(matrix(g.weighted_e, alone_rows, n.R, n.padded), {g.weights});
      Product a = product(n.R, n.R, {{transposed(weighted), transposed(e), alone_rows}});
      a.out = {g.d_square_form}, a.out_stride = n.padded;
      b.add(a);
      Product c =
          product(n.R + 1, 0, {{transposed(weighted), with_ones(transposed(e)), alone_rows}});
      c.tail = {g.d_square_form + n.R * padded};
      b.add(c);
    }
    if (op.d_text.data) b.add(RowKind::text_coefficient, n.C);
    b.run(stream);
  }

  const int deltas = first_row == 0 && of_y ? (n.C * n.H + kWarps - 1) / kWarps : 0;
  launch(rows_backward, n.B + deltas, kItemThreads, 0, stream, rows);

  // ---- Attention
  if (attends && of_y) {
    run_attention_backward({p, first_row, end_row, g.d_out, g.delta, g.d_y, n.scale}, stream);
  }

  // ---- Products with rows of all texts and items
  const auto columns_of = [](const Operand& o) { return transposed(o); };
  {
    Builder b(p);
    const Operand d_y = matrix(g.d_y, n.rows, 3 * n.E, 3 * n.E);
    if (of_x) {
      Product a =
          product(n.rows, n.E, {{d_y, transposed(matrix(w.in_weight, 3 * n.E, n.E)), 3 * n.E}});
      a.out = {g.d_x}, a.out_stride = n.E;
      b.add(a);
    }
    if (of_inner) {
      const auto heads_of = [&](float* m, int count, int across) {
        return columns_of(
            by_head(matrix(m, count, n.R, across * n.padded), across > 1 ? n.padded : 0));
      };
      const auto ones = [&](const Operand& o) { return with_ones(columns_of(o)); };
      const Operand from_text =
          by_head(columns_of(matrix(d_from_text, n.C, n.R, n.H * n.padded)), n.padded);
      const Operand from_item =
          by_head(columns_of(matrix(d_from_item, n.B, n.R, n.H * n.padded)), n.padded);
      Product a = product(
          n.R, n.d,
          {{from_text, ones(attended_texts(p)), pairs ? n.C : 0},
           {from_item, ones(projected(p, true, 2)), pairs ? n.B : 0},
           {heads_of(g.d_e_z, alone_rows, 1), ones(attended_alone(p)), alone_rows},
           {heads_of(g.d_item_z, n.B, 1), ones(attended_items(p)), p.adapts_item ? n.B : 0}});
      inner_slabs.aim(&a, n.E);
      a.batches = n.H, a.out_batch = n.d, a.tail_batch = n.R;
      b.add(a);
    }
    if (of_in) {
      Product a = product(
          3 * n.E, n.E,
          {{columns_of(d_y), with_ones(columns_of(matrix(s.x, n.rows, n.E, n.E))), n.rows}});
      in_slabs.aim(&a, n.E);
      b.add(a);
    }
    if (of_last) {
      const bool texts = p.form != Form::none;
      const Operand form = with_column(matrix(g.d_square_form, n.R + 1, n.R, n.padded),
                                       {g.d_square_form + n.R * padded});
      Product a = product(
          n.D, n.R,
          {{columns_of(matrix(op.text, n.C, n.D)),
            with_column(columns_of(matrix(g.d_text_w, n.C, n.R, n.padded)), {g.d_text_c}),
            texts ? n.C : 0},
           {columns_of(matrix(s.unit, n.B, n.D, n.D)),
            with_column(columns_of(matrix(g.d_item_w, n.B, n.R, n.padded)), {g.d_item_c}),
            texts ? n.B : 0},
           {columns_of(matrix(g.d_u, n.B, n.D, n.D)),
            with_ones(columns_of(matrix(s.item_e, n.B, n.R, n.padded))), p.adapts_item ? n.B : 0},
           {last_layer(p), columns_of(form), texts ? n.R + 1 : 0}});
      last_slabs.aim(&a, n.R);
      b.add(a);
    }
    b.run(stream);
  }
  if (of_hidden && n.two_down) {
    Builder b(p);
    Product a = product(n.rows, n.first_width,
                        {{matrix(g.d_x, n.rows, n.E, n.E),
                          transposed(matrix(w.down_weight_2, n.E, n.first_width)), n.E}});
    a.out = {g.d_hidden}, a.out_stride = n.first_width;
    a.slope_at = s.hidden, a.activation = op.down_activation;
    b.add(a);
    b.run(stream);
  }

  // ---- Features, and the first layers
  const float* const d_first = n.two_down ? g.d_hidden : g.d_x;
  const Operand first_text = matrix(d_first, n.C, n.first_width, n.first_width);
  const Operand first_item = matrix(d_first + C * n.first_width, n.B, n.first_width, n.first_width);
  {
    Builder b(p);
    const Operand down = transposed(matrix(w.down_weight, n.first_width, n.D));
    Product text = product(
        n.C, n.D,
        {{matrix(g.d_similarity, n.C, n.B, n.B), transposed(matrix(s.unit, n.B, n.D, n.D)), n.B},
         {with_column(matrix(g.d_text_w, n.C, n.R, n.padded), {g.d_text_c}), last_layer(p),
          p.form == Form::none ? 0 : n.R + 1},
         {first_text, down, n.first_width}});
    text.out = {op.d_text.data, op.d_text.dtype}, text.out_stride = n.D;
    text.addend = matrix(op.text, n.C, n.D), text.addend_scale = g.coefficient;
    b.add(text);
    Product image = product(n.B, n.D, {{first_item, down, n.first_width}});
    image.out = {op.d_image.data, op.d_image.dtype}, image.out_stride = n.D;
    image.addend = matrix(g.d_item, n.B, n.D, n.D);
    b.add(image);
    if (of_first) {
      Product a = product(
          n.first_width, n.D,
          {{columns_of(first_text), with_ones(columns_of(matrix(op.text, n.C, n.D))), n.C},
           {columns_of(first_item), with_ones(columns_of(matrix(op.image, n.B, n.D))), n.B}});
      first_slabs.aim(&a, n.D);
      b.add(a);
    }
    if (of_second) {
      Product a =
          product(n.E, n.first_width,
                  {{columns_of(matrix(g.d_x, n.rows, n.E, n.E)),
                    with_ones(columns_of(matrix(s.active, n.rows, n.first_width, n.first_width))),
                    n.rows}});
      second_slabs.aim(&a, n.first_width);
      b.add(a);
    }
    b.add(Sum{d_blends, blocks + n.B, 1, 1, 1, out.blend});
    b.add(in_slabs.weights(out.in_weight)), b.add(in_slabs.biases(out.in_bias));
    b.add(last_slabs.weights(d_w)), b.add(last_slabs.biases(d_c));
    if (p.gelu) {
      b.add(inner_slabs.weights({d_inner})), b.add(inner_slabs.biases({d_inner_bias}));
      b.add(inner_slabs.biases(out.up_bias));
    } else {
      b.add(inner_slabs.weights(out.out_weight)), b.add(inner_slabs.biases(out.out_bias));
    }
    b.run(stream);
  }
  Builder b(p);
  b.add(first_slabs.weights(out.down_weight)), b.add(first_slabs.biases(out.down_bias));
  b.add(second_slabs.weights(out.down_weight_2)), b.add(second_slabs.biases(out.down_bias_2));
  if (of_composed) {
    const Operand d = with_column(matrix(d_inner, n.R, n.E, n.E), {d_inner_bias});
    Product up =
        product(n.R, n.E, {{d, with_column(matrix(w.out_weight, n.E, n.E), w.out_bias), n.E + 1}});
    up.out = out.up_weight, up.out_stride = n.E;
    b.add(up);
    Product o =
        product(n.E, n.E, {{transposed(matrix(w.up_weight, n.R, n.E)), transposed(d), n.R}});
    o.out = out.out_weight, o.out_stride = n.E, o.tail = out.out_bias;
    b.add(o);
  }
  b.run(stream);
}

}  // namespace fastadapters::cuda::head

// Launches the kernels of cross-modal attention for products in one dtype.
#pragma once

#include <algorithm>
#include <cmath>

#include "backward.cuh"
#include "forward.cuh"
#include "texts.cuh"

namespace fastadapters::cuda::attention {

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Beyond this a difference of biases decides alone: the weaker block is as blocked.
constexpr float kDecisive = 1e6f;
constexpr double kLog2E = 1.4426950408889634;

inline Tokens tokens_of(const Heads& x, const CrossModalAttention& op, int64_t items,
                        int64_t tokens, int64_t items_of_group) {
  const int64_t size = size_of(op.dtype);
  Tokens t{static_cast<char*>(x.data), x.item * size, x.token * size, x.head * size, int(tokens),
           int(items_of_group)};
  t.aligned = on_16_bytes(x.data) && (items == 1 || t.item % 16 == 0) &&
              (tokens == 1 || t.token % 16 == 0) && (op.heads == 1 || t.head % 16 == 0);
  return t;
}

// Of texts or images as the op has them.
inline Tokens tokens_of(const Heads& x, const CrossModalAttention& op, int modality) {
  if (modality == kImage) return tokens_of(x, op, op.items, op.images, op.shared ? op.items : 1);
  return tokens_of(x, op, op.shared ? 1 : op.items, op.texts, 1);
}

// Of [B, C, H, d], row by row of an item.
inline Tokens texts_of_items(const Heads& x, const CrossModalAttention& op) {
  return tokens_of(x, op, op.items, op.texts, 1);
}

inline void set_up(const CrossModalAttention& op, Problem* p) {
  p->groups = op.shared ? 1 : int(op.items);
  p->items = op.shared ? int(op.items) : 1;
  p->heads = int(op.heads);
  p->width = int(op.width);
  p->images = int(op.images);
  p->rows[kText] = int(op.texts);
  p->rows[kImage] = int(p->items * op.images);
  p->scale = float(op.scale * kLog2E);
  for (int i = 0; i < 2; ++i) {
    bool (&sees)[2] = p->sees[i];
    for (int k = 0; k < 2; ++k) sees[k] = op.bias[i][k] > -INFINITY;
    const float shift = sees[0] && sees[1] ? op.bias[i][kImage] - op.bias[i][kText] : 0;
    if (std::fabs(shift) > kDecisive) {
      sees[shift < 0 ? kImage : kText] = false;
    } else {
      p->add[i][shift < 0 ? kImage : kText] = float(-std::fabs(shift) * kLog2E);
    }
    p->single[i] = sees[kText] * op.texts + sees[kImage] * op.images == 1;
    const Attended& x = i == kText ? op.text : op.image;
    p->q[i] = tokens_of(x.q, op, i);
    p->k[i] = tokens_of(x.k, op, i);
    p->v[i] = tokens_of(x.v, op, i);
  }
}

inline void set_state(const StateSizes& sizes, float* state, Problem* p) {
  p->out[kText] = state;
  p->out[kImage] = p->out[kText] + sizes.out[kText];
  p->softmax[kText] = reinterpret_cast<float2*>(p->out[kImage] + sizes.out[kImage]);
  p->softmax[kImage] = p->softmax[kText] + sizes.softmax[kText] / 2;
}

// Blocks: of so many rows of some kind, for each head.
template <class P>
void launch_blocks(void (*kernel)(P), int64_t blocks, int threads, int shared, cudaStream_t stream,
                   const P& p) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("fastadapters: too many heads or tokens");
  launch(kernel, dim3(unsigned(blocks)), threads, shared, stream, p);
}

template <class E, int kWidth>
void run(const CrossModalAttentionForward& op, Arena* arena, cudaStream_t stream) {
  Forward p;
  set_up(op, &p);
  const bool text = op.text_out.data && op.items > 0;
  const bool over_texts = text && p.sees[kText][kText];
  const StateSizes sizes(op);
  if (op.state) {
    set_state(sizes, op.state, &p);
  } else if (over_texts) {
    p.out[kText] = arena->take<float>(sizes.out[kText] * 4);
    p.softmax[kText] = arena->take<float2>(sizes.softmax[kText] * 4);
  }
  if (arena->counting) return;

  if (over_texts) p.tiles[kText] = int(divide_up(p.rows[kText], kRows));
  if (op.image_out.data) {
    p.tiles[kImage] = int(divide_up(p.rows[kImage], kRows));
    p.image_out = tokens_of(op.image_out, op, kImage);
  }
  launch_blocks(attend<E, kWidth>, int64_t(p.tiles[kText] + p.tiles[kImage]) * p.groups * p.heads,
                kThreads, Layout<E, kWidth, 1>::kTotal, stream, p);
  if (!text) return;
  TextOut t;
  static_cast<Problem&>(t) = p;
  t.text_out = texts_of_items(op.text_out, op);
  t.tiles = int(divide_up(op.texts * op.heads, Columns<E, kWidth>::kRowsOfBlock));
  const int64_t wanted = divide_up(8 * current_device().processors, int64_t(t.tiles) * p.groups);
  t.items_of_block = int(divide_up(p.items, wanted));
  launch_blocks(text_out<E, kWidth>,
                int64_t(t.tiles) * p.groups * divide_up(p.items, t.items_of_block), kRowThreads, 0,
                stream, t);
}

template <class E, int kWidth>
void run(const CrossModalAttentionBackward& op, Arena* arena, cudaStream_t stream) {
  using C = Columns<E, kWidth>;
  Prepare p;
  set_up(op, &p);
  set_state(StateSizes(op), op.state, &p);
  p.gradient_scale = op.scale;
  const Attended* const gradients[2] = {&op.d_text, &op.d_image};
  for (int i = 0; i < 2; ++i) {
    p.dq[i] = tokens_of(gradients[i]->q, op, i);
    p.dk[i] = tokens_of(gradients[i]->k, op, i);
    p.dv[i] = tokens_of(gradients[i]->v, op, i);
    const int tiles = int(divide_up(p.rows[i], kRows));
    p.tiles[i][0] = p.dq[i].data ? tiles : 0;
    p.tiles[i][1] = p.dk[i].data || p.dv[i].data ? tiles : 0;
  }
  const auto wants_keys = [&](int i) { return p.tiles[i][1] > 0; };

  // What the results of texts lead to: gradients of texts, of images, of both.
  const bool text = op.d_text_out.data && op.items > 0, by_images = text && p.sees[kText][kImage];
  const bool by_texts = text && p.sees[kText][kText] && (p.dq[kText].data || wants_keys(kText));
  TextImages t;
  static_cast<Problem&>(t) = p;
  t.d_out = texts_of_items(op.d_text_out, op);
  t.tiles = int(divide_up(p.rows[kText], C::kRowsOfBlock));
  const int64_t blocks = int64_t(t.tiles) * p.groups * p.heads;
  if (text) {
    const int64_t wanted = divide_up(4 * current_device().processors, blocks);
    t.items_of_split = int(divide_up(p.items, wanted));
    t.splits = int(divide_up(p.items, t.items_of_split));
  }
  const int64_t text_rows = int64_t(p.groups) * p.rows[kText] * p.heads;
  const int64_t image_rows = int64_t(p.groups) * p.rows[kImage] * p.heads;
  const auto slabs = [&](bool there, int64_t count, int64_t size) {
    return there ? arena->take<float>(count * size * 4) : nullptr;
  };
  const bool scores = by_images && !p.single[kText];
  const bool dq = scores && p.dq[kText].data, dk = scores && p.dk[kImage].data;
  const bool dv = by_images && p.dv[kImage].data;
  t.d_texts = slabs(by_texts, t.splits, text_rows * p.width);
  t.d_delta = slabs(by_texts, t.splits, text_rows);
  t.dq = slabs(dq, t.splits, text_rows * p.width);
  t.dk = slabs(dk, t.tiles, image_rows * p.width);
  t.dv = slabs(dv, t.tiles, image_rows * p.width);

  p.d_texts = t.d_texts, p.d_delta = t.d_delta;
  p.dq_slabs = t.dq, p.dk_slabs = t.dk, p.dv_slabs = t.dv;
  p.splits = t.splits, p.text_tiles = t.tiles;
  const bool image = op.d_image_out.data &&
                     ((p.sees[kImage][kText] && (p.dq[kImage].data || wants_keys(kText))) ||
                      (p.sees[kImage][kImage] && (p.dq[kImage].data || wants_keys(kImage))));
  if (by_texts) {
    // Rows on 16 bytes, whatever d is.
    Heads rows;
    rows.head = round_up(p.width, 16 / size_of(op.dtype));
    rows.token = rows.head * op.heads;
    rows.item = rows.token * op.texts;
    rows.data = arena->take<char>(text_rows * rows.head * size_of(op.dtype));
    p.d_out[kText] = tokens_of(rows, op, kText);
    p.delta[kText] = arena->take<float>(text_rows * 4);
  }
  if (image) {
    p.d_out[kImage] = tokens_of(op.d_image_out, op, kImage);
    p.delta[kImage] = arena->take<float>(image_rows * 4);
  }
  if (arena->counting) return;

  if (by_texts || dq || dk || dv) {
    launch_blocks(text_images<E, kWidth>, blocks * t.splits, kRowThreads, 0, stream, t);
  }
  const int64_t rows = (by_texts ? text_rows : 0) + (image ? image_rows : 0);
  launch_blocks(prepare<E, kWidth>, divide_up(rows, C::kRowsOfBlock), kRowThreads, 0, stream, p);
  const int64_t tiles =
      p.tiles[kText][0] + p.tiles[kText][1] + p.tiles[kImage][0] + p.tiles[kImage][1];
  launch_blocks(attend_backward<E, kWidth>, tiles * p.groups * p.heads, kThreads,
                Layout<E, kWidth, 2>::kTotal, stream, static_cast<const Backward&>(p));
}

template <class E, class Op>
void run(const Op& op, Arena* arena, cudaStream_t stream) {
  if (op.width <= 32) {
    run<E, 32>(op, arena, stream);
  } else if (op.width <= 64) {
    run<E, 64>(op, arena, stream);
  } else {
    run<E, 128>(op, arena, stream);
  }
}

}  // namespace fastadapters::cuda::attention

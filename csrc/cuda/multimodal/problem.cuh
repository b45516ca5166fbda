// What every kernel of the head is told, and what forward keeps for backward.
//
// C texts, B items, D features; E the attention's width in H heads of d; R the width before the
// last layer, `padded` its multiple of 8: rows of that many numbers have zeros at the end. The last
// layer is (W [D, R], c [D]); the one before it and the attention's output projection are composed
// to `inner` [R, E]. Texts come before items where they share a matrix.
#pragma once

#include "../../multimodal.h"
#include "../launch.cuh"
#include "scalars.cuh"

namespace fastadapters::cuda::head {

// What e, the adapter's last hidden vector of a text, depends on.
enum class Form { pair, item, text, none };

struct State {
  float *text_scale, *text_square;   // [C] 1 / |t|, floored; |t|^2 after scaling: 1 or nearly 0
  float *hidden, *active;            // [C + B, down_hidden] before and behind the activation
  float *x, *y;                      // [C + B, E], [C + B, 3 E] queries (scaled), keys, values
  float *attended, *lse;             // [C + B, E] over the texts; [H, C + B]
  float* merged;                     // [B, E] over the texts and the item itself
  float *inner_weight, *inner_bias;  // [R, E], [R]
  double* gram;                      // [R + 1, R + 1] of the columns of (W, c)
  float* square_form;                // [R + 1, padded] the same
  float* factor;                     // [R + 1, padded] column i: row i of U, U^T U = gram; last
  float *text_w, *text_c;            // [C, padded], [C]: unit texts times W, c
  float *item_z, *item_e;            // [B, padded] of the image branch
  float *u, *unit, *lengths;         // [B, D] W e + c, the blended unit row; [3, B] |u|, |p|, |i|
  float *item_w, *item_c;            // [padded, B], [B]: unit rows times W, c
  float *from_text, *from_item;      // [C, H, padded], [H, padded, B]: inner, head by head
  float* odds;                       // [H, C, B] of the item's log-odds against the texts
  float* similarity;                 // [C, B]
  float *square, *text_dot, *item_dot;  // [C, B] each: |u|^2, t u, i u; a vector in other forms
  float *z, *e;                         // [C or B, padded] if e depends on one of them alone
};

struct Problem {
  Multimodal op;
  int texts, items, dim, width, heads, depth, rank, padded, rows;  // rows = C + B
  Form form;
  bool gelu;  // between two up-sampling layers
  bool adapts_item;
  Parameter w, c;                      // the last layer
  Parameter inner_weight, inner_bias;  // fp32 or, for one up-sampling layer, out_proj itself
  State s;
  void* logits = nullptr;
  const void* d_logits = nullptr;
};

constexpr float kBlocked = -__builtin_huge_valf();

inline bool sees(const Multimodal& op, int query, int key) {
  return op.bias[query][key] > kBlocked;
}

// Which queries attend over texts, as rows: [first, end).
inline int first_query(const Problem& p) {
  return p.form == Form::pair || p.form == Form::text ? 0 : p.texts;
}
inline int end_query(const Problem& p) {
  return p.adapts_item && sees(p.op, 1, 0) ? p.rows : p.texts;
}

// fp32 numbers, pieces on 16 bytes.
struct Numbers {
  float* base = nullptr;
  int64_t used = 0;
  float* take(int64_t count) {
    float* const piece = base ? base + used : nullptr;
    used += round_up(count, 4);
    return piece;
  }
};

inline int64_t rank_of(const Multimodal& op) { return op.up_hidden ? op.up_hidden : op.width; }

// fastadapters/ops/multimodal.py has the sum of these.
inline State lay_out(const Multimodal& op, Numbers* n) {
  const int64_t C = op.texts, B = op.items, D = op.dim, E = op.width, H = op.heads;
  const int64_t rows = C + B, R = rank_of(op), padded = round_up(R, 8);
  State s;
  s.text_scale = n->take(C), s.text_square = n->take(C);
  s.hidden = n->take(rows * op.down_hidden), s.active = n->take(rows * op.down_hidden);
  s.x = n->take(rows * E), s.y = n->take(rows * 3 * E);
  s.attended = n->take(rows * E), s.lse = n->take(H * rows);
  s.merged = n->take(B * E);
  s.inner_weight = n->take(R * E), s.inner_bias = n->take(R);
  s.gram = reinterpret_cast<double*>(n->take(2 * (R + 1) * (R + 1)));
  s.square_form = n->take((R + 1) * padded), s.factor = n->take((R + 1) * padded + 1);
  s.text_w = n->take(C * padded), s.text_c = n->take(C);
  s.item_z = n->take(B * padded), s.item_e = n->take(B * padded);
  s.u = n->take(B * D), s.unit = n->take(B * D), s.lengths = n->take(3 * B);
  s.item_w = n->take(padded * B), s.item_c = n->take(B);
  s.from_text = n->take(C * H * padded), s.from_item = n->take(H * padded * B);
  s.odds = n->take(H * C * B), s.similarity = n->take(C * B);
  s.square = n->take(C * B), s.text_dot = n->take(C * B), s.item_dot = n->take(C * B);
  const int64_t most = C > B ? C : B;
  s.z = n->take(most * padded), s.e = n->take(most * padded);
  return s;
}

inline Problem problem_of(const Multimodal& op, float* state) {
  if ((op.texts + op.items) * (3 * op.width + op.down_hidden + op.dim) > INT32_MAX ||
      op.texts * op.items > INT32_MAX / 4 || op.heads * rank_of(op) > INT32_MAX / 64) {
    throw std::runtime_error("fastadapters: sizes beyond 32-bit indices of the CUDA kernels");
  }
  Problem p;
  p.op = op;
  p.texts = int(op.texts), p.items = int(op.items), p.dim = int(op.dim);
  p.width = int(op.width), p.heads = int(op.heads), p.depth = int(op.width / op.heads);
  p.rank = int(rank_of(op)), p.padded = int(round_up(p.rank, 8)), p.rows = p.texts + p.items;
  p.gelu = op.up_hidden != 0;
  p.adapts_item = op.adapt != Adapt::text;
  const bool over_texts = sees(op, 0, 0), over_item = sees(op, 0, 1);
  p.form = op.adapt == Adapt::image  ? Form::none
           : over_texts && over_item ? Form::pair
           : over_texts              ? Form::text
                                     : Form::item;
  Numbers n{state};
  p.s = lay_out(op, &n);
  const MultimodalParameters& w = op.parameters;
  p.w = p.gelu ? w.up_weight_2 : w.up_weight;
  p.c = p.gelu ? w.up_bias_2 : w.up_bias;
  p.inner_weight = p.gelu ? Parameter{p.s.inner_weight} : w.out_weight;
  p.inner_bias = p.gelu ? Parameter{p.s.inner_bias} : w.out_bias;
  return p;
}

__host__ __device__ inline int item_tiles(const Problem& p) { return (p.items + 31) / 32; }

// Rows of e where it depends on one index alone.
inline int hidden_rows(const Problem& p) {
  return p.form == Form::item ? p.items : p.form == Form::text ? p.texts : 0;
}

__device__ __forceinline__ float activate_inner(const Problem& p, float z) {
  return p.gelu ? gelu(z).x : z;
}

__device__ __forceinline__ float feature(const Features& f, int row, int i) {
  return load(f.data, f.dtype, row * f.stride + i);
}

__device__ __forceinline__ float last_weight(const Problem& p, int i, int r) {
  return load(p.w.data, p.w.dtype, int64_t(i) * p.rank + r);
}

}  // namespace fastadapters::cuda::head

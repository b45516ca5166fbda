// What finishes backward behind the pairs, by small products, from the logits to the features.
#pragma once

#include "forward.h"
#include "pair_backward.h"
#include "separate_backward.h"

namespace fastadapters::cpu {
namespace {

constexpr int64_t kTextRows = 64;  // of the gradient of the texts at a time

inline void write_row(const Parameter& out, int64_t offset, const float* from, int64_t n) {
  with_type(out, [&](auto* to) {
    for (int64_t j = 0; j < n; j += kLanes) store(to + offset + j, load(from + j, n - j), n - j);
  });
}
inline void write_gradient(const Parameter& out, const float* from, int64_t n) {
  if (out.data && out.data != from) write_row(out, 0, from, n);
}
// Where a gradient is computed: in place, if it is fp32.
inline float* place_of(const Parameter& out, float* scratch) {
  return out.data && out.dtype == Dtype::float32 ? (float*)out.data : scratch;
}

struct BackwardArrays {
  Head h;
  Needs needs;
  Pairs pairs;
  Separate separate;
  PairGradients of_pairs;
  PairBackwardArrays pair;
  SeparateBackwardArrays apart;
  PackedTexts packed;
  AttentionGradients attention;
  float* along;        // [C]: of a unit text's gradient, what lies along it
  float* d_image;      // [B, D]: by the unit vector that meets the texts, then by the image
  float* d_adapted;    // [B, D]
  float *e, *d_inner;  // [B, R + 1], [B, R] of the images
  float *d_inner_weight, *d_inner_bias;  // [R, E], [R]
  float* d_mixed;                        // [B, E]
  float *d_attended, *d_lse;             // [N, E], [N, H]
  float *d_qkv, *d_x;                    // [N, 3 E], [N, E]
  float *hidden, *d_hidden;              // [N, down_hidden]: activated
  float *weight, *bias;                  // gradients of any parameter, as fp32
  float* block;                          // [kTextRows, D]

  BackwardArrays(Carver& c, const MultimodalBackward& p, const Threads& threads)
      : h(c, p),
        needs(h, p),
        pairs(c, h),
        separate(c, h),
        of_pairs(c, h),
        pair(c, h, pairs, threads),
        apart(c, h, separate, threads),
        packed(c, h, true, needs.tokens),
        attention(c, h, threads, needs.tokens),
        along(c.take<float>(h.texts)),
        d_image(place_of({p.d_image.data, p.d_image.dtype},
                         c.take<float>(h.items * h.dim, needs.blended))),
        d_adapted(c.take<float>(h.items * h.dim, h.adapts_image)),
        e(c.take<float>(h.items * h.columns, h.adapts_image)),
        d_inner(c.take<float>(h.items * h.inner, h.adapts_image)),
        d_inner_weight(c.take<float>(h.inner * h.width)),
        d_inner_bias(c.take<float>(h.inner)),
        d_mixed(c.take<float>(h.items * h.width, h.adapts_image)),
        d_attended(c.take<float>(h.rows * h.width, needs.tokens)),
        d_lse(c.take<float>(h.rows * h.heads, needs.tokens)),
        d_qkv(c.take<float>(h.rows * 3 * h.width, needs.tokens)),
        d_x(c.take<float>(h.rows * h.width, needs.tokens)),
        hidden(c.take<float>(h.rows * h.down_hidden, needs.tokens)),
        d_hidden(c.take<float>(h.rows * h.down_hidden, needs.tokens)),
        block(c.take<float>(kTextRows * h.dim, needs.text)) {
    int64_t down = h.down_hidden ? h.down_hidden : h.width;
    weight = c.take<float>(
        greatest(greatest(down * h.dim, h.width * h.down_hidden),
                 greatest(greatest(3 * h.width, h.inner) * h.width, h.dim * h.columns)));
    bias = c.take<float>(greatest(greatest(down, 3 * h.width), h.inner));
  }
};

// From the gradient by x / max(|x|, floor), `unit`, that by x.
inline void through_unit(float* d, const float* unit, float length, int64_t n) {
  float along = length >= kFloor ? dot(d, unit, n) : 0;
  float inverse = 1 / std::fmax(length, kFloor);
  for (int64_t j = 0; j < n; ++j) d[j] = (d[j] - along * unit[j]) * inverse;
}

// Whatever the texts' gradients need of the pairs, as gradients by texts of any length.
inline void scale_texts(const BackwardArrays& a, const MultimodalState& s) {
  const Head& h = a.h;
  const PairGradients& g = a.of_pairs;
  for (int64_t i = 0; i < h.texts; ++i) {
    float *dots = g.dots + i * g.ld, *text_dots = g.text_dots + i * g.padded;
    a.along[i] = dot(dots, s.dots + i * h.items, h.items);
    for (int64_t j = 0; j < h.items; ++j) dots[j] *= s.inverse[i];
    if (!h.adapts_text) continue;
    a.along[i] += dot(text_dots, s.text_dots + i * h.columns, h.columns);
    for (int64_t j = 0; j < h.columns; ++j) text_dots[j] *= s.inverse[i];
  }
}

// d_image and, where images are adapted, d_adapted; returns the gradient of the blend.
inline double images_backward(const BackwardArrays& a, const MultimodalBackward& p,
                              const MultimodalState& s, const Threads& threads) {
  const Head& h = a.h;
  const PairGradients& g = a.of_pairs;
  multiply(threads, h.items, h.dim, h.texts, columns_of(g.dots, g.ld), h.text, a.d_image, h.dim);
  if (h.adapts_text)
    multiply(threads, h.items, h.dim, h.columns, rows_of(g.image_dots, g.padded),
             columns_of(h.last, h.columns), a.d_image, h.dim, true);
  bool unit = p.adapt != Adapt::image;
  double share = 0;
  for (int64_t b = 0; b < h.items; ++b) {
    float *d = a.d_image + b * h.dim, *d_adapted = a.d_adapted + b * h.dim;
    const float *lengths = s.lengths + 3 * b, *adapted = s.adapted + b * h.dim;
    const float* image = h.image.data + b * h.image.row;
    through_unit(d, s.image + b * h.dim, lengths[2], h.dim);
    float from_image = unit ? 1 / std::fmax(lengths[0], kFloor) : 1;
    if (!h.adapts_image) {
      float along = lengths[0] >= kFloor ? dot(d, image, h.dim) * from_image * from_image : 0;
      for (int64_t j = 0; j < h.dim; ++j) d[j] = from_image * (d[j] - along * image[j]);
      continue;
    }
    float from_adapted = 1 / std::fmax(lengths[1], kFloor);
    float by_image = dot(d, image, h.dim) * from_image;
    float by_adapted = dot(d, adapted, h.dim) * from_adapted;
    share += by_adapted - by_image;
    by_image = unit && lengths[0] >= kFloor ? by_image * from_image : 0;
    by_adapted = lengths[1] >= kFloor ? by_adapted * from_adapted : 0;
    for (int64_t j = 0; j < h.dim; ++j) {
      float v = d[j];
      d_adapted[j] = h.share * from_adapted * (v - by_adapted * adapted[j]);
      d[j] = h.rest * from_image * (v - by_image * image[j]);
    }
  }
  return share;
}

// d_inner of the images.
inline void inner_backward(const BackwardArrays& a, const MultimodalState& s,
                           const Threads& threads) {
  const Head& h = a.h;
  multiply(threads, h.items, h.inner, h.dim, rows_of(a.d_adapted, h.dim),
           rows_of(h.last, h.columns), a.d_inner, h.inner);
  through_activation(h, h.items, s.inner, a.d_inner);
}

inline void last_layer_backward(const BackwardArrays& a, const MultimodalBackward& p,
                                const MultimodalState& s, const Threads& threads) {
  const Head& h = a.h;
  const PairGradients& g = a.of_pairs;
  int64_t n = h.columns;
  float* d = a.weight;
  std::memset(d, 0, h.dim * n * sizeof(float));
  if (h.adapts_text) {
    multiply(threads, h.dim, n, h.texts, h.text.transposed(), rows_of(g.text_dots, g.padded), d, n);
    multiply(threads, h.dim, n, h.items, columns_of(s.image, h.dim),
             rows_of(g.image_dots, g.padded), d, n, true);
    multiply(threads, h.dim, n, n, rows_of(h.last, n), rows_of(g.form, g.padded), d, n, true);
  }
  for (int64_t i = 0; i < h.dim; ++i)
    for (int64_t j = 0; j < h.inner; ++j) d[i * n + j] += d[i * n + h.inner] * s.center[j];
  if (h.adapts_image) {
    activate_rows(h, h.items, s.inner, nullptr, a.e);
    multiply(threads, h.dim, n, h.items, columns_of(a.d_adapted, h.dim), rows_of(a.e, n), d, n,
             true);
  }
  const MultimodalParameters& out = p.gradients;
  const Parameter& weight = h.gelu ? out.up_weight_2 : out.up_weight;
  const Parameter& bias = h.gelu ? out.up_bias_2 : out.up_bias;
  for (int64_t i = 0; i < h.dim; ++i) {
    if (weight.data) write_row(weight, i * h.inner, d + i * n, h.inner);
    if (bias.data) write_row(bias, i, d + i * n + h.inner, 1);
  }
}

// Gradients of the layers that are one here: `out` and the first of two up-sampling layers.
inline void inner_layer_backward(const BackwardArrays& a, const MultimodalBackward& p,
                                 const MultimodalState& s, const Threads& threads) {
  const Head& h = a.h;
  float *d = a.d_inner_weight, *d_bias = a.d_inner_bias;
  std::memset(d, 0, h.inner * h.width * sizeof(float));
  std::memset(d_bias, 0, h.inner * sizeof(float));
  if (Pairs::wanted(h)) {
    int64_t ld = h.heads * a.pairs.inner;
    for (int64_t i = 0; i < h.heads; ++i) {
      int64_t at = i * h.head, from = i * a.pairs.inner;
      multiply(threads, h.inner, h.head, h.texts, columns_of(a.pair.from_text + from, ld),
               rows_of(s.attended + at, h.width), d + at, h.width, true);
      multiply(threads, h.inner, h.head, h.items, columns_of(a.pair.from_image + from, ld),
               rows_of(s.qkv + h.texts * 3 * h.width + 2 * h.width + at, 3 * h.width), d + at,
               h.width, true);
    }
    add_column_sums(h.texts * h.heads, h.inner, a.pair.from_text, a.pairs.inner, d_bias);
    add_column_sums(h.items * h.heads, h.inner, a.pair.from_image, a.pairs.inner, d_bias);
    for (int64_t i = 0; i < h.inner; ++i) d_bias[i] /= h.heads;
  }
  if (Separate::wanted(h)) {
    if (h.sees[0][0] || h.sees[0][1])
      multiply(threads, h.inner, h.width, a.separate.rows, columns_of(a.apart.z, h.inner),
               a.separate.attention(h, s), d, h.width, true);
    add_column_sums(a.separate.rows, h.inner, a.apart.z, h.inner, d_bias);
  }
  if (h.adapts_image) {
    multiply(threads, h.inner, h.width, h.items, columns_of(a.d_inner, h.inner),
             rows_of(s.mixed, h.width), d, h.width, true);
    add_column_sums(h.items, h.inner, a.d_inner, h.inner, d_bias);
  }
  const MultimodalParameters& out = p.gradients;
  if (!h.gelu) {
    write_gradient(out.out_weight, d, h.inner * h.width);
    write_gradient(out.out_bias, d_bias, h.inner);
    return;
  }
  if (out.out_weight.data) {
    float* weight = place_of(out.out_weight, a.weight);
    multiply(threads, h.width, h.width, h.inner, columns_of(h.up, h.width), rows_of(d, h.width),
             weight, h.width);
    write_gradient(out.out_weight, weight, h.width * h.width);
  }
  if (out.out_bias.data) {
    multiply(threads, 1, h.width, h.inner, rows_of(d_bias, h.inner), rows_of(h.up, h.width), a.bias,
             h.width);
    write_gradient(out.out_bias, a.bias, h.width);
  }
  if (out.up_weight.data) {
    multiply(threads, h.inner, h.width, h.width, rows_of(d, h.width), columns_of(h.out, h.width),
             a.weight, h.width);
    for (int64_t i = 0; i < h.inner; ++i)
      for (int64_t j = 0; j < h.width; ++j) a.weight[i * h.width + j] += d_bias[i] * h.out_bias[j];
    write_gradient(out.up_weight, a.weight, h.inner * h.width);
  }
  write_gradient(out.up_bias, d_bias, h.inner);
}

}  // namespace
}  // namespace fastadapters::cpu

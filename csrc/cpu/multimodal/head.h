// The head's sizes, what of it an option leaves to be done, and its parameters in fp32.
#pragma once

#include <cmath>

#include "../activation.h"
#include "../product.h"
#include "state.h"

namespace fastadapters::cpu {
namespace {

// On what the activations of the last layer depend when it adapts the texts.
enum class Hidden { pair, item, text };

struct Head {
  int64_t texts, items, rows;           // C, B, N = C + B
  int64_t dim, width, heads, head;      // D, E, H, d = E / H
  int64_t down_hidden, inner, columns;  // columns = R + 1: the last layer and its bias
  bool adapts_text, adapts_image, gelu;
  bool sees[2][2];                  // [queries of texts, images][keys of texts, images]
  bool needs[2][3];                 // [texts, images][queries, keys, values]
  int64_t first_query, last_query;  // rows that attend over the texts
  Hidden hidden;
  float scale, share, rest, logit_scale;  // d^-1/2; blend, 1 - blend
  float text_odds, image_odds;            // bias of image keys less that of text keys
  View text, image;
  const float *down, *down_bias, *down_2, *down_bias_2, *in, *in_bias, *out, *out_bias;
  const float *up, *up_bias;               // the first of two layers, if there are two
  const float *inner_weight, *inner_bias;  // [R, E], [R]: that layer after `out`, or `out`
  float* last;  // [D, R + 1]: the last layer, its bias as a column; see `find_center`

  Head(Carver& c, const Multimodal& p)
      : texts(p.texts),
        items(p.items),
        rows(p.texts + p.items),
        dim(p.dim),
        width(p.width),
        heads(p.heads),
        head(p.width / p.heads),
        down_hidden(p.down_hidden),
        inner(p.up_hidden ? p.up_hidden : p.width),
        columns(inner + 1),
        adapts_text(p.adapt != Adapt::image),
        adapts_image(p.adapt != Adapt::text),
        gelu(p.up_hidden > 0) {
    for (int q = 0; q < 2; ++q)
      for (int k = 0; k < 2; ++k)
        sees[q][k] = (q ? adapts_image : adapts_text) && p.bias[q][k] > -INFINITY;
    hidden = sees[0][0] && sees[0][1] ? Hidden::pair : sees[0][0] ? Hidden::text : Hidden::item;
    bool text_mixes = sees[0][0] && sees[0][1], image_mixes = sees[1][0] && sees[1][1];
    needs[0][0] = sees[0][0];
    needs[0][1] = needs[0][2] = sees[0][0] || sees[1][0];
    needs[1][0] = sees[1][0];
    needs[1][1] = text_mixes || image_mixes;
    needs[1][2] = sees[0][1] || sees[1][1];
    first_query = sees[0][0] ? 0 : texts;
    last_query = sees[1][0] ? rows : texts;
    text_odds = p.bias[0][1] - p.bias[0][0];
    image_odds = p.bias[1][1] - p.bias[1][0];
    scale = float(1 / std::sqrt(double(head)));

    const MultimodalParameters& w = p.parameters;
    share = w.blend.data ? *fp32(c, w.blend, 1) : p.blend_value;
    rest = w.blend.data ? 1 - share : p.rest_value;
    logit_scale = w.logit_scale.data ? *fp32(c, w.logit_scale, 1) : p.scale_value;
    text = features(c, p.text, texts);
    image = features(c, p.image, items);
    int64_t down_width = down_hidden ? down_hidden : width;
    down = fp32(c, w.down_weight, down_width * dim);
    down_bias = fp32(c, w.down_bias, down_width);
    down_2 = fp32(c, w.down_weight_2, width * down_hidden);
    down_bias_2 = fp32(c, w.down_bias_2, width);
    in = fp32(c, w.in_weight, 3 * width * width);
    in_bias = fp32(c, w.in_bias, 3 * width);
    out = fp32(c, w.out_weight, width * width);
    out_bias = fp32(c, w.out_bias, width);
    up = up_bias = nullptr;
    inner_weight = out;
    inner_bias = out_bias;
    const float* last_weight = fp32(c, gelu ? w.up_weight_2 : w.up_weight, dim * inner);
    const float* last_bias = fp32(c, gelu ? w.up_bias_2 : w.up_bias, dim);
    last = c.take<float>(dim * columns);
    if (gelu) {
      up = fp32(c, w.up_weight, inner * width);
      up_bias = fp32(c, w.up_bias, inner);
      auto* weight = c.take<float>(inner * width);
      auto* bias = c.take<float>(inner);
      inner_weight = weight;
      inner_bias = bias;
      if (c.base) {
        multiply({}, inner, width, width, rows_of(up, width), rows_of(out, width), weight, width);
        for (int64_t i = 0; i < inner; ++i)
          bias[i] = up_bias[i] + dot(up + i * width, out_bias, width);
      }
    }
    for (int64_t i = 0; c.base && i < dim; ++i) {
      std::memcpy(last + i * columns, last_weight + i * inner, inner * sizeof(float));
      last[i * columns + inner] = last_bias[i];
    }
  }

  // Whether a group of rows, texts (0) or images (1), passes through the down-sampler.
  bool samples(int group) const { return needs[group][0] || needs[group][1] || needs[group][2]; }
  // The rows whose queries (0), keys (1) or values (2) are needed.
  struct Rows {
    int64_t first, count;
  };
  Rows needing(int part) const {
    int64_t first = needs[0][part] ? 0 : texts;
    return {first, (needs[1][part] ? rows : texts) - first};
  }
  int64_t first_row(int group) const { return group ? texts : 0; }
  int64_t count(int group) const { return group ? items : texts; }
  View features_of(int group) const { return group ? image : text; }

 private:
  // Where the values are, if they are fp32, else a copy.
  static const float* fp32(Carver& c, const Parameter& p, int64_t n) {
    static constexpr float nothing = 0;
    if (!p.data) return nullptr;
    if (p.dtype == Dtype::float32) return c.base ? (const float*)p.data : &nothing;
    float* copy = c.take<float>(n);
    if (!c.base) return &nothing;
    with_type(p, [&](auto* from) {
      for (int64_t i = 0; i < n; i += kLanes) store(copy + i, load(from + i, n - i), n - i);
    });
    return copy;
  }

  View features(Carver& c, const Features& f, int64_t n) const {
    if (f.dtype == Dtype::float32) return rows_of((const float*)f.data, f.stride);
    float* copy = c.take<float>(n * dim);
    for (int64_t i = 0; c.base && i < n; ++i)
      with_type({f.data, f.dtype}, [&](auto* from) {
        for (int64_t j = 0; j < dim; j += kLanes)
          store(copy + i * dim + j, load(from + i * f.stride + j, dim - j), dim - j);
      });
    return rows_of(copy, dim);
  }
};

constexpr float kFloor = 1e-12f;  // of a length that is divided by

// Rows (e ; 1), e = activation(z), less `center` if there is one.
inline void activate_rows(const Head& h, int64_t m, const float* z, const float* center, float* e) {
  for (int64_t i = 0; i < m; ++i, z += h.inner, e += h.columns) {
    for (int64_t j = 0; j < h.inner; j += kLanes) {
      Vec v = load(z + j, h.inner - j);
      if (h.gelu) v = gelu(v).value;
      if (center) v -= load(center + j, h.inner - j);
      store(e + j, v, h.inner - j);
    }
    e[h.inner] = 1;
  }
}

// d [m, R] becomes the gradient by z, from that by activation(z).
inline void through_activation(const Head& h, int64_t m, const float* z, float* d) {
  for (int64_t i = 0; h.gelu && i < m * h.inner; i += kLanes) {
    int64_t n = m * h.inner - i;
    store(d + i, load(d + i, n) * gelu(load(z + i, n)).derivative, n);
  }
}

}  // namespace
}  // namespace fastadapters::cpu

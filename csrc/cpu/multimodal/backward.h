// Backward: the pairs first, then the layers from the last to the first.
#pragma once

#include "chain.h"

namespace fastadapters::cpu {
namespace {

// d_attended, d_lse, and what comes to d_qkv without attention over the texts.
inline void mixtures_backward(const BackwardArrays& a, const MultimodalState& s,
                              const Threads& threads) {
  const Head& h = a.h;
  int64_t qkv = 3 * h.width;
  View weight = rows_of(h.inner_weight, h.width);
  float *of_images = a.d_qkv + h.texts * qkv, *d_values = of_images + 2 * h.width;
  std::memset(a.d_qkv, 0, h.rows * qkv * sizeof(float));
  std::memset(a.d_attended, 0, h.rows * h.width * sizeof(float));
  std::memset(a.d_lse, 0, h.rows * h.heads * sizeof(float));
  if (Separate::wanted(h)) {
    if (a.separate.by_text)
      multiply(threads, h.texts, h.width, h.inner, rows_of(a.apart.z, h.inner), weight,
               a.d_attended, h.width);
    else if (h.sees[0][1])
      multiply(threads, h.items, h.width, h.inner, rows_of(a.apart.z, h.inner), weight, d_values,
               qkv);
  }
  if (Pairs::wanted(h)) {
    int64_t ld = h.heads * a.pairs.inner;
    for (int64_t i = 0; i < h.heads; ++i) {
      int64_t at = i * h.head, from = i * a.pairs.inner;
      float* d_odds = a.pairs.odds + i * h.texts * a.pairs.ld;
      for (int64_t text = 0; text < h.texts; ++text) {
        float* row = d_odds + text * a.pairs.ld;
        a.d_lse[text * h.heads + i] = -sum(row, h.items);
        for (int64_t item = 0; item < h.items; ++item) row[item] *= h.scale;
      }
      multiply(threads, h.texts, h.head, h.items, rows_of(d_odds, a.pairs.ld),
               rows_of(s.qkv + h.texts * qkv + h.width + at, qkv), a.d_qkv + at, qkv);
      multiply(threads, h.items, h.head, h.texts, columns_of(d_odds, a.pairs.ld),
               rows_of(s.qkv + at, qkv), of_images + h.width + at, qkv);
      multiply(threads, h.texts, h.head, h.inner, rows_of(a.pair.from_text + from, ld),
               weight.from(0, at), a.d_attended + at, h.width);
      multiply(threads, h.items, h.head, h.inner, rows_of(a.pair.from_image + from, ld),
               weight.from(0, at), d_values + at, qkv);
    }
  }
  if (!h.adapts_image) return;
  multiply(threads, h.items, h.width, h.inner, rows_of(a.d_inner, h.inner), weight, a.d_mixed,
           h.width);
  for (int64_t item = 0; item < h.items; ++item)
    for (int64_t i = 0; i < h.heads; ++i) {
      ImageOdds odds = image_odds(h, s, item, i);
      int64_t row = h.texts + item, at = row * qkv + i * h.head;
      const float* d = a.d_mixed + item * h.width + i * h.head;
      const float *q = s.qkv + at, *k = q + h.width, *v = k + h.width;
      const float* o = s.attended + row * h.width + i * h.head;
      float *dq = a.d_qkv + at, *dk = dq + h.width, *dv = dk + h.width;
      float* d_o = a.d_attended + row * h.width + i * h.head;
      for (int64_t j = 0; h.sees[1][1] && j < h.head; ++j) dv[j] += odds.image * d[j];
      for (int64_t j = 0; h.sees[1][0] && j < h.head; ++j) d_o[j] = odds.texts * d[j];
      if (!h.sees[1][0] || !h.sees[1][1]) continue;
      float by_odds = odds.image * odds.texts * (dot(d, v, h.head) - dot(d, o, h.head));
      a.d_lse[row * h.heads + i] = -by_odds;
      for (int64_t j = 0; j < h.head; ++j) {
        dq[j] += by_odds * h.scale * k[j];
        dk[j] += by_odds * h.scale * q[j];
      }
    }
}

// The sums of d [N, n] over the rows that pass through the down-sampler.
inline void bias_gradient(const BackwardArrays& a, const float* d, int64_t n,
                          const Parameter& bias) {
  const Head& h = a.h;
  if (!bias.data) return;
  std::memset(a.bias, 0, n * sizeof(float));
  for (int group = 0; group < 2; ++group)
    if (h.samples(group)) add_column_sums(h.count(group), n, d + h.first_row(group) * n, n, a.bias);
  write_gradient(bias, a.bias, n);
}

// d^T x of those rows, x by group, and their sums.
template <class Inputs>
inline void layer_gradients(const BackwardArrays& a, const Threads& threads, const float* d,
                            int64_t n_out, int64_t n_in, const Inputs& inputs,
                            const Parameter& weight, const Parameter& bias) {
  const Head& h = a.h;
  if (weight.data) {
    float* sum = place_of(weight, a.weight);
    bool add = false;
    for (int group = 0; group < 2; ++group) {
      if (!h.samples(group)) continue;
      multiply(threads, n_out, n_in, h.count(group),
               columns_of(d + h.first_row(group) * n_out, n_out), inputs(group), sum, n_in, add);
      add = true;
    }
    if (!add) std::memset(sum, 0, n_out * n_in * sizeof(float));
    write_gradient(weight, sum, n_out * n_in);
  }
  bias_gradient(a, d, n_out, bias);
}

// From d_qkv the gradients of the layers before attention; returns that by what the first of them
// gives, [N, its width].
inline const float* projections_backward(const BackwardArrays& a, const MultimodalBackward& p,
                                         const MultimodalState& s, const Threads& threads) {
  const Head& h = a.h;
  const MultimodalParameters& out = p.gradients;
  int64_t width = h.width, n = h.down_hidden;
  auto features = [&](int group) { return h.features_of(group); };
  if (out.in_weight.data) {
    float* weight = place_of(out.in_weight, a.weight);
    for (int part = 0; part < 3; ++part) {
      auto [row, m] = h.needing(part);
      multiply(threads, width, width, m,
               columns_of(a.d_qkv + row * 3 * width + part * width, 3 * width),
               rows_of(s.x + row * width, width), weight + part * width * width, width);
    }
    write_gradient(out.in_weight, weight, 3 * width * width);
  }
  bias_gradient(a, a.d_qkv, 3 * width, out.in_bias);
  if (!a.needs.text && !a.needs.image && !a.needs.down) return nullptr;
  for (int group = 0; group < 2; ++group) {
    if (!h.samples(group)) continue;
    int64_t row = h.first_row(group), first = h.needs[group][0] ? 0 : width;
    multiply(threads, h.count(group), width, 3 * width - first,
             rows_of(a.d_qkv + row * 3 * width + first, 3 * width),
             rows_of(h.in + first * width, width), a.d_x + row * width, width);
  }
  if (!n) {
    layer_gradients(a, threads, a.d_x, width, h.dim, features, out.down_weight, out.down_bias);
    return a.d_x;
  }
  for (int group = 0; group < 2; ++group) {
    if (!h.samples(group)) continue;
    int64_t row = h.first_row(group), count = h.count(group);
    float *hidden = a.hidden + row * n, *d_hidden = a.d_hidden + row * n;
    multiply(threads, count, n, width, rows_of(a.d_x + row * width, width), rows_of(h.down_2, n),
             d_hidden, n);
    for (int64_t i = 0; i < count * n; i += kLanes) {
      int64_t left = count * n - i;
      Vec z = load(s.hidden + row * n + i, left);
      Activated at_z = activate(p.down_activation, z);
      store(hidden + i, at_z.value, left);
      store(d_hidden + i, backpropagate(p.down_activation, z, at_z, load(d_hidden + i, left)),
            left);
    }
  }
  layer_gradients(
      a, threads, a.d_x, width, n,
      [&](int group) { return rows_of(a.hidden + h.first_row(group) * n, n); }, out.down_weight_2,
      out.down_bias_2);
  layer_gradients(a, threads, a.d_hidden, n, h.dim, features, out.down_weight, out.down_bias);
  return a.d_hidden;
}

// The features' gradients, of which those of the texts are made here altogether.
inline void features_backward(const BackwardArrays& a, const MultimodalBackward& p,
                              const MultimodalState& s, const Threads& threads, const float* d) {
  const Head& h = a.h;
  const PairGradients& g = a.of_pairs;
  int64_t n = h.down_hidden ? h.down_hidden : h.width;
  if (a.needs.image) {
    if (h.samples(1))
      multiply(threads, h.items, h.dim, n, rows_of(d + h.texts * n, n), rows_of(h.down, h.dim),
               a.d_image, h.dim, true);
    write_gradient({p.d_image.data, p.d_image.dtype}, a.d_image, h.items * h.dim);
  }
  const Parameter d_text = {p.d_text.data, p.d_text.dtype};
  for (int64_t row = 0; a.needs.text && row < h.texts; row += kTextRows) {
    int64_t rows = least(kTextRows, h.texts - row), n_out = h.dim;
    float* block = place_of(d_text, nullptr);
    block = block ? block + row * n_out : a.block;
    for (int64_t i = 0; i < rows; ++i) {
      float inverse = s.inverse[row + i];
      const float* text = h.text.data + (row + i) * h.text.row;
      // A length below the floor is a constant, but then |t|^2 is not.
      float factor = inverse < 1 / kFloor ? -a.along[row + i] : 2 * g.text_square[row + i];
      factor *= inverse * inverse;
      for (int64_t j = 0; j < n_out; ++j) block[i * n_out + j] = factor * text[j];
    }
    auto add = [&](int64_t k, View d, View layer) {
      multiply(threads, rows, n_out, k, d, layer, block, n_out, true);
    };
    add(h.items, rows_of(g.dots + row * g.ld, g.ld), rows_of(s.image, h.dim));
    if (h.adapts_text)
      add(h.columns, rows_of(g.text_dots + row * g.padded, g.padded),
          columns_of(h.last, h.columns));
    if (h.samples(0)) add(n, rows_of(d + row * n, n), rows_of(h.down, h.dim));
    if (block == a.block) write_row(d_text, row * n_out, block, rows * n_out);
  }
}

// d_logits [B, C] as [C, ld], 0 beyond.
inline void read_gradients(const MultimodalBackward& p, float* to, int64_t ld) {
  with_type({const_cast<void*>(p.d_logits), p.out_dtype}, [&](auto* from) {
    for (int64_t item = 0; item < ld; item += kLanes)
      for (int64_t text = 0; text < p.texts; text += kLanes) {
        Vec block[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          block[i] =
              item + i < p.items ? load(from + (item + i) * p.texts + text, p.texts - text) : Vec{};
        transpose(block);
        for (int64_t i = 0; i < least(kLanes, p.texts - text); ++i)
          store(to + (text + i) * ld + item, block[i]);
      }
  });
}

inline void backward(const MultimodalBackward& p, const MultimodalState& s,
                     const Threads& threads) {
  auto a = carve<BackwardArrays>(shared_scratch(), p, threads);
  const Head& h = a.h;
  const Needs& needs = a.needs;
  PairGradients& g = a.of_pairs;
  center_last_layer(h, s);
  g.clear(h);
  read_gradients(p, g.dots, g.ld);
  if (Pairs::wanted(h)) {
    a.pairs.fill(h, s, threads);
    pair_backward(h, a.pairs, s, needs, threads, a.pair, g);
  } else if (Separate::wanted(h)) {
    a.separate.fill(h, s, threads);
    separate_backward(h, a.separate, s, threads, a.apart, g);
  } else {
    for (int64_t i = 0; i < h.texts; ++i) {
      float* d = g.dots + i * g.ld;
      g.scale += dot(d, s.dots + i * h.items, h.items);
      for (int64_t j = 0; j < h.items; ++j) d[j] *= h.logit_scale;
    }
  }
  scale_texts(a, s);
  if (needs.blended) g.share += images_backward(a, p, s, threads);
  if (needs.last) last_layer_backward(a, p, s, threads);
  if (needs.hidden && h.adapts_image) inner_backward(a, s, threads);
  if (needs.out || needs.up) inner_layer_backward(a, p, s, threads);
  const float* d = nullptr;
  if (needs.tokens) {
    mixtures_backward(a, s, threads);
    if (h.last_query > h.first_query) {
      a.packed.fill(h, threads, s.qkv);
      attend_backward(h, a.packed, a.attention, threads, s, a.d_attended, a.d_lse, a.d_qkv);
    }
    d = projections_backward(a, p, s, threads);
  }
  features_backward(a, p, s, threads, d);
  float scale = float(g.scale), share = float(g.share);
  write_gradient(p.gradients.logit_scale, &scale, 1);
  write_gradient(p.gradients.blend, &share, 1);
}

}  // namespace
}  // namespace fastadapters::cpu

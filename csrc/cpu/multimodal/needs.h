// Which gradients are asked for, and what they need of the chain behind them; what the pairs hand
// to that chain.
#pragma once

#include "head.h"

namespace fastadapters::cpu {
namespace {

struct Needs {
  bool text, image, down, in, out, up, last, blend;
  bool tokens;   // gradients of queries, keys and values
  bool hidden;   // those of what the activation before the last layer sees
  bool blended;  // those of the images as they meet the texts

  Needs(const Head& h, const MultimodalBackward& p) {
    const MultimodalParameters& g = p.gradients;
    text = p.d_text.data;
    image = p.d_image.data;
    down = g.down_weight.data || g.down_bias.data || g.down_weight_2.data || g.down_bias_2.data;
    in = g.in_weight.data || g.in_bias.data;
    out = g.out_weight.data || g.out_bias.data;
    up = h.gelu && (g.up_weight.data || g.up_bias.data);
    last = h.gelu ? g.up_weight_2.data || g.up_bias_2.data : g.up_weight.data || g.up_bias.data;
    blend = g.blend.data;
    tokens = text || image || down || in;
    hidden = tokens || out || up;
    blended = image || (h.adapts_image && (hidden || last || blend));
  }
};

// Rows of `padded` numbers hold the R + 1 of (W | b).
struct PairGradients {
  int64_t ld, padded;
  float* dots;         // [C, ld]: those of the logits, to become those of text times image
  float* text_dots;    // [C, padded]
  float* image_dots;   // [B, padded]
  float* form;         // [R + 1, padded]: 2 sum of d|u|^2 (e ; 1) (e ; 1)^T
  float* text_square;  // [C]
  double scale = 0, share = 0;

  PairGradients(Carver& c, const Head& h)
      : ld(round_up(h.items, kLanes)),
        padded(round_up(h.columns, kLanes)),
        dots(c.take<float>(h.texts * ld)),
        text_dots(c.take<float>(h.texts * padded, h.adapts_text)),
        image_dots(c.take<float>(h.items * padded, h.adapts_text)),
        form(c.take<float>(h.columns * padded, h.adapts_text)),
        text_square(c.take<float>(h.texts)) {}

  void clear(const Head& h) const {
    std::memset(text_square, 0, h.texts * sizeof(float));
    if (!h.adapts_text) return;
    std::memset(text_dots, 0, h.texts * padded * sizeof(float));
    std::memset(image_dots, 0, h.items * padded * sizeof(float));
    std::memset(form, 0, h.columns * padded * sizeof(float));
  }
};

}  // namespace
}  // namespace fastadapters::cpu

// What forward leaves for backward. Text rows come first, image rows behind them: N = C + B.
#pragma once

#include "../../multimodal.h"

namespace fastadapters::cpu {

struct MultimodalState {
  int64_t size = 0;

  float* hidden;     // [N, down_hidden]: between two down-sampling layers
  float* x;          // [N, E]: the tokens
  float* qkv;        // [N, 3 E]
  float* attended;   // [N, E]: attention of a row over the texts
  float* lse;        // [N, H]: log-sum-exp of its scores
  float* inverse;    // [C]: 1 / length of a text
  float* center;     // [R]: what is taken off the activations e, see `find_center`
  float* text_dots;  // [C, R + 1]: unit text times (W | b), the last layer
  float* form;       // [R + 1, R + 1]: L, |W e + b| = |L (e ; 1)|
  float* mixed;      // [B, E]: attention of an image
  float* inner;      // [B, R]: what the last layer's activation sees of it
  float* adapted;    // [B, D]: what the adapter makes of it
  float* image;      // [B, D]: the unit vector that meets the texts
  float* lengths;    // [B, 3]: of the image, of what is adapted, of the blend
  float* dots;       // [C, B]: unit text times unit image

  MultimodalState(const Multimodal& p, float* base) : base_(base) {
    const int64_t c = p.texts, b = p.items, n = c + b, r = p.up_hidden ? p.up_hidden : p.width;
    hidden = take(n * p.down_hidden);
    x = take(n * p.width);
    qkv = take(n * 3 * p.width);
    attended = take(n * p.width);
    lse = take(n * p.heads);
    inverse = take(c);
    center = take(r);
    text_dots = take(c * (r + 1));
    form = take((r + 1) * (r + 1));
    mixed = take(b * p.width);
    inner = take(b * r);
    adapted = take(b * p.dim);
    image = take(b * p.dim);
    lengths = take(b * 3);
    dots = take(c * b);
  }

 private:
  float* base_;
  float* take(int64_t n) {
    float* p = base_ ? base_ + size : nullptr;
    size += n;
    return p;
  }
};

}  // namespace fastadapters::cpu

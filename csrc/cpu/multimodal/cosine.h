// The scalar end of a pair of a text and an image: from the adapted text's products to the logit.
//
//     n = 1 / |u|      new = share u n + rest t      cos = new . i      logit = scale cos / |new|
#pragma once

#include "head.h"

namespace fastadapters::cpu {
namespace {

constexpr float kFloorSquare = 1e-24f;

struct Products {
  Vec square;       // |u|^2
  Vec text_dot;     // u . t
  Vec image_dot;    // u . i
  Vec dot;          // t . i
  Vec text_square;  // |t|^2: 1, or less where the length of a text is below the floor
};

struct Cosine {
  Vec n, unit, square, cosine, rho;  // unit: |u n|^2; square: |new|^2; rho: 1 / |new|
};

inline Cosine cosine(const Head& h, const Products& p) {
  Cosine c;
  c.n = 1.0f / square_root(p.square < kFloorSquare ? broadcast(kFloorSquare) : p.square);
  c.unit = p.square < kFloorSquare ? p.square * c.n * c.n : broadcast(1);
  c.square = h.share * h.share * c.unit + h.rest * h.rest * p.text_square +
             2 * h.share * h.rest * p.text_dot * c.n;
  c.cosine = h.share * p.image_dot * c.n + h.rest * p.dot;
  c.rho = 1.0f / square_root(c.square < kFloorSquare ? broadcast(kFloorSquare) : c.square);
  return c;
}

inline Vec logit(const Head& h, const Products& p) {
  Cosine c = cosine(h, p);
  return h.logit_scale * c.cosine * c.rho;
}

struct ProductGradients {
  Products by;
  Vec scale, share;
};

inline ProductGradients cosine_backward(const Head& h, const Products& p, Vec gradient) {
  Cosine c = cosine(h, p);
  ProductGradients d;
  Vec d_cosine = h.logit_scale * c.rho * gradient;
  Vec d_square = c.square < kFloorSquare ? Vec{} : -0.5f * d_cosine * c.cosine * c.rho * c.rho;
  d.scale = gradient * c.cosine * c.rho;
  d.by.image_dot = h.share * c.n * d_cosine;
  d.by.text_dot = 2 * h.share * h.rest * c.n * d_square;
  d.by.dot = h.rest * d_cosine;
  d.by.text_square = h.rest * h.rest * d_square;
  // Through |u n|^2 nothing comes, unless |u| is below the floor.
  d.by.square =
      p.square < kFloorSquare
          ? h.share * h.share * c.n * c.n * d_square
          : -0.5f * c.n * c.n * (p.image_dot * d.by.image_dot + p.text_dot * d.by.text_dot);
  d.share =
      (p.image_dot * c.n - p.dot) * d_cosine + (2 * h.share * c.unit - 2 * h.rest * p.text_square +
                                                2 * (1 - 2 * h.share) * p.text_dot * c.n) *
                                                   d_square;
  return d;
}

inline float text_square(const Head& h, const MultimodalState& s, int64_t text) {
  float inverse = s.inverse[text];
  if (inverse < 1 / kFloor) return 1;
  const float* t = h.text.data + text * h.text.row;
  return dot(t, t, h.dim) * inverse * inverse;
}

}  // namespace
}  // namespace fastadapters::cpu

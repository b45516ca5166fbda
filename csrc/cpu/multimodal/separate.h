// The pairs where what the adapter makes of a text depends on the image alone, on the text alone or
// on nothing: one product has a number for each pair, the rest is scalar. "Rows" are those of the
// images or of the texts.
#pragma once

#include "cosine.h"

namespace fastadapters::cpu {
namespace {

struct Separate {
  bool by_text;
  int64_t rows, ld;   // ld: of a row of images, whole vectors
  float *z, *e;       // [rows, R], [rows, R + 1]
  float* form;        // [rows, R + 1]: L (e ; 1)
  float* square;      // [rows]: |u|^2
  float* own;         // [rows]: u times the unit vector of the same row
  float* cross;       // [C, ld]: u times the other unit vector
  float* image_dots;  // [B, R + 1]: unit image times (W | b)

  static bool wanted(const Head& h) { return h.adapts_text && h.hidden != Hidden::pair; }

  Separate(Carver& c, const Head& h)
      : by_text(h.hidden == Hidden::text),
        rows(by_text ? h.texts : h.items),
        ld(round_up(h.items, kLanes)),
        z(c.take<float>(rows * h.inner, wanted(h))),
        e(c.take<float>(rows * h.columns, wanted(h))),
        form(c.take<float>(rows * h.columns, wanted(h))),
        square(c.take<float>(round_up(rows, kLanes), wanted(h))),
        own(c.take<float>(round_up(rows, kLanes), wanted(h))),
        cross(c.take<float>(h.texts * ld, wanted(h))),
        image_dots(c.take<float>(h.items * h.columns, wanted(h))) {}

  // The attention of the rows, if they see anything.
  View attention(const Head& h, const MultimodalState& s) const {
    return by_text ? rows_of(s.attended, h.width)
                   : rows_of(s.qkv + h.texts * 3 * h.width + 2 * h.width, 3 * h.width);
  }
  const float* own_dots(const MultimodalState& s) const {
    return by_text ? s.text_dots : image_dots;
  }

  void fill(const Head& h, const MultimodalState& s, const Threads& threads) const {
    int64_t n = h.columns, width = by_text || h.sees[0][1] ? h.width : 0;
    multiply(threads, rows, h.inner, width, attention(h, s), columns_of(h.inner_weight, h.width), z,
             h.inner, false, h.inner_bias);
    activate_rows(h, rows, z, s.center, e);
    multiply(threads, rows, n, n, rows_of(e, n), columns_of(s.form, n), form, n);
    multiply(threads, h.items, n, h.dim, rows_of(s.image, h.dim), rows_of(h.last, n), image_dots,
             n);
    for (int64_t i = 0; i < rows; ++i) {
      square[i] = dot(form + i * n, form + i * n, n);
      own[i] = dot(e + i * n, own_dots(s) + i * n, n);
    }
    for (int64_t i = rows; i < round_up(rows, kLanes); ++i) square[i] = own[i] = 0;
    multiply(threads, h.texts, h.items, n, rows_of(by_text ? e : s.text_dots, n),
             columns_of(by_text ? image_dots : e, n), cross, ld);
  }

  // Of a text and kLanes images.
  Products products(const Head& h, const MultimodalState& s, int64_t text, int64_t item) const {
    int64_t left = h.items - item;
    Vec other = load(cross + text * ld + item, left);
    Vec same = by_text ? broadcast(own[text]) : read<Vec>(own + item);
    return {by_text ? broadcast(square[text]) : read<Vec>(square + item), by_text ? same : other,
            by_text ? other : same, load(s.dots + text * h.items + item, left),
            broadcast(text_square(h, s, text))};
  }
};

// logits [C, ld]
inline void separate_forward(const Head& h, const Separate& p, const MultimodalState& s,
                             const Threads& threads, float* logits) {
  parallel(threads, threads.count, [&](int64_t task) {
    for (int64_t text = h.texts * task / threads.count; text < h.texts * (task + 1) / threads.count;
         ++text)
      for (int64_t item = 0; item < h.items; item += kLanes)
        store(logits + text * p.ld + item, logit(h, p.products(h, s, text, item)));
  });
}

}  // namespace
}  // namespace fastadapters::cpu

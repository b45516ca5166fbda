// Forward: what depends on a text or on an image alone, by small products; then the pairs.
#pragma once

#include "attention.h"
#include "pair.h"
#include "separate.h"

namespace fastadapters::cpu {
namespace {

constexpr int kDoubles = kLanes / 2;
typedef double Double __attribute__((vector_size(8 * kDoubles)));
inline Double doubles(const float* p) {
  typedef float Floats __attribute__((vector_size(4 * kDoubles)));
  return __builtin_convertvector(read<Floats>(p), Double);
}

constexpr int64_t kGramRows = 32;  // at a time
inline int64_t gram_ld(const Head& h) { return round_up(h.columns, 8); }

// gram [ld, ld] += x^T x for x [rows, ld], where the column is not before the row by 8 or more.
inline void add_gram(int64_t rows, int64_t ld, const double* x, double* gram) {
  for (int64_t i = 0; i < ld; i += 8)
    for (int64_t j = i; j < ld; j += kDoubles) {
      Double sum[8] = {};
      for (int64_t row = 0; row < rows; ++row) {
        const double* at = x + row * ld;
        Double xj = read<Double>(at + j);
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) sum[k] += at[i + k] * xj;
      }
      for (int k = 0; k < 8; ++k) {
        double* to = gram + (i + k) * ld + j;
        sum[k] += read<Double>(to);
        std::memcpy(to, &sum[k], sizeof sum[k]);
      }
    }
}

// L [R + 1, R + 1], upper triangular, with L^T L = (W | b)^T (W | b), in double: |W e + b|^2 as
// |L (e ; 1)|^2 is never negative and keeps its digits where W e nearly cancels b, unlike the
// quadratic form of that product. `gram` [ld + kGramRows, ld] is scratch.
inline void factor(const Head& h, double* gram, float* form) {
  int64_t n = h.columns, ld = gram_ld(h);
  double* block = gram + ld * ld;
  std::memset(gram, 0, (ld + kGramRows) * ld * sizeof(double));
  for (int64_t row = 0; row < h.dim; row += kGramRows) {
    int64_t rows = least(kGramRows, h.dim - row);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < n; ++j) block[i * ld + j] = h.last[(row + i) * n + j];
    add_gram(rows, ld, block, gram);
  }
  std::memset(form, 0, n * n * sizeof(float));
  for (int64_t i = 0; i < n; ++i) block[i] = 1e-14 * gram[i * ld + i];
  for (int64_t k = 0; k < n; ++k) {
    double* row = gram + k * ld;
    // What is left of a column that depends on those before it is noise.
    if (row[k] <= block[k]) continue;
    double inverse = 1 / std::sqrt(row[k]);
    for (int64_t j = k; j < n; ++j) form[k * n + j] = float(row[j] *= inverse);
    for (int64_t i = k + 1; i < n; ++i)
      for (int64_t j = i / 8 * 8; j < ld; ++j) gram[i * ld + j] -= row[i] * row[j];
  }
}

// u = W e + b = W (e - center) + (b + W center): where u is small because the terms cancel for
// every e, e is nearly the same everywhere, and near to it both terms are small. The center is what
// the mean of the texts' values gives, as attention over them nearly does: no item's logits depend
// on another item. `mean` [E] is scratch.
inline void find_center(const Head& h, const MultimodalState& s, float* mean) {
  std::memset(mean, 0, h.width * sizeof(float));
  if (h.needs[0][2]) add_column_sums(h.texts, h.width, s.qkv + 2 * h.width, 3 * h.width, mean);
  for (int64_t i = 0; i < h.width; ++i) mean[i] /= float(h.texts);
  for (int64_t i = 0; i < h.inner; ++i) {
    float z = h.inner_bias[i] + dot(mean, h.inner_weight + i * h.width, h.width);
    float e = h.gelu ? gelu(broadcast(z)).value[0] : z;
    s.center[i] = std::isfinite(e) ? e : 0;
  }
}
inline void center_last_layer(const Head& h, const MultimodalState& s) {
  for (int64_t i = 0; i < h.dim; ++i) {
    float* row = h.last + i * h.columns;
    double bias = row[h.inner];
    Double sum = {};
    int64_t j = 0;
    for (; j + kDoubles <= h.inner; j += kDoubles) sum += doubles(row + j) * doubles(s.center + j);
    for (; j < h.inner; ++j) bias += double(row[j]) * s.center[j];
    for (int k = 0; k < kDoubles; ++k) bias += sum[k];
    row[h.inner] = float(bias);
  }
}

// hidden, x and what is needed of qkv. `activated` [C or B, down_hidden] is scratch.
inline void project(const Head& h, const Multimodal& p, const Threads& threads,
                    const MultimodalState& s, float* activated) {
  for (int group = 0; group < 2; ++group) {
    if (!h.samples(group)) continue;
    int64_t m = h.count(group), row = h.first_row(group), n = h.down_hidden;
    float* x = s.x + row * h.width;
    if (n) {
      float* hidden = s.hidden + row * n;
      multiply(threads, m, n, h.dim, h.features_of(group), columns_of(h.down, h.dim), hidden, n,
               false, h.down_bias);
      for (int64_t i = 0; i < m * n; i += kLanes)
        store(activated + i, activate(p.down_activation, load(hidden + i, m * n - i)).value,
              m * n - i);
      multiply(threads, m, h.width, n, rows_of(activated, n), columns_of(h.down_2, n), x, h.width,
               false, h.down_bias_2);
    } else {
      multiply(threads, m, h.width, h.dim, h.features_of(group), columns_of(h.down, h.dim), x,
               h.width, false, h.down_bias);
    }
  }
  for (int part = 0; part < 3; ++part) {
    auto [row, m] = h.needing(part);
    if (m > 0)
      multiply(threads, m, h.width, h.width, rows_of(s.x + row * h.width, h.width),
               columns_of(h.in + part * h.width * h.width, h.width),
               s.qkv + row * 3 * h.width + part * h.width, 3 * h.width, false,
               h.in_bias + part * h.width);
  }
}

// The weights of what an image sees: of the texts, and of itself.
struct ImageOdds {
  float texts, image;
};
inline ImageOdds image_odds(const Head& h, const MultimodalState& s, int64_t item, int64_t i) {
  if (!h.sees[1][0] || !h.sees[1][1]) return {float(h.sees[1][0]), float(h.sees[1][1])};
  int64_t row = h.texts + item;
  const float* q = s.qkv + row * 3 * h.width + i * h.head;
  float x = dot(q, q + h.width, h.head) * h.scale + h.image_odds - s.lse[row * h.heads + i];
  float small = std::exp(-std::fabs(x)), large = 1 / (1 + small);
  small *= large;
  return x > 0 ? ImageOdds{small, large} : ImageOdds{large, small};
}

// mixed: attention of the images.
inline void mix_images(const Head& h, const MultimodalState& s) {
  for (int64_t item = 0; item < h.items; ++item)
    for (int64_t i = 0; i < h.heads; ++i) {
      ImageOdds odds = image_odds(h, s, item, i);
      int64_t row = h.texts + item;
      const float* v = s.qkv + row * 3 * h.width + 2 * h.width + i * h.head;
      const float* o = s.attended + row * h.width + i * h.head;
      float* to = s.mixed + item * h.width + i * h.head;
      for (int64_t j = 0; j < h.head; ++j)
        to[j] = (h.sees[1][0] ? odds.texts * o[j] : 0) + (h.sees[1][1] ? odds.image * v[j] : 0);
    }
}

// adapted, image, lengths: from the images' features and, maybe, what the adapter makes of them.
inline void finish_images(const Head& h, const MultimodalState& s, const Threads& threads,
                          const Multimodal& p, float* e) {
  if (h.adapts_image) {
    mix_images(h, s);
    multiply(threads, h.items, h.inner, h.width, rows_of(s.mixed, h.width),
             columns_of(h.inner_weight, h.width), s.inner, h.inner, false, h.inner_bias);
    activate_rows(h, h.items, s.inner, nullptr, e);
    multiply(threads, h.items, h.dim, h.columns, rows_of(e, h.columns),
             columns_of(h.last, h.columns), s.adapted, h.dim);
  }
  bool unit = p.adapt != Adapt::image;
  for (int64_t b = 0; b < h.items; ++b) {
    const float* image = h.image.data + b * h.image.row;
    const float* u = s.adapted + b * h.dim;
    float* to = s.image + b * h.dim;
    float* lengths = s.lengths + 3 * b;
    lengths[0] = std::sqrt(dot(image, image, h.dim));
    lengths[1] = h.adapts_image ? std::sqrt(dot(u, u, h.dim)) : 1;
    float from_image = (h.adapts_image ? h.rest : 1) / (unit ? std::fmax(lengths[0], kFloor) : 1);
    float from_adapted = h.adapts_image ? h.share / std::fmax(lengths[1], kFloor) : 0;
    for (int64_t j = 0; j < h.dim; j += kLanes) {
      Vec v = load(image + j, h.dim - j) * from_image;
      if (h.adapts_image) v += load(u + j, h.dim - j) * from_adapted;
      store(to + j, v, h.dim - j);
    }
    lengths[2] = std::sqrt(dot(to, to, h.dim));
    for (int64_t j = 0; j < h.dim; j += kLanes)
      store(to + j, load(to + j, h.dim - j) / std::fmax(lengths[2], kFloor), h.dim - j);
  }
}

// inverse, dots and, where texts are adapted, text_dots and form.
inline void finish_texts(const Head& h, const MultimodalState& s, const Threads& threads,
                         double* gram) {
  if (h.adapts_text) factor(h, gram, s.form);
  for (int64_t i = 0; i < h.texts; ++i) {
    const float* text = h.text.data + i * h.text.row;
    s.inverse[i] = 1 / std::fmax(std::sqrt(dot(text, text, h.dim)), kFloor);
  }
  auto multiply_unit = [&](int64_t n, View b, float* to) {
    multiply(threads, h.texts, n, h.dim, h.text, b, to, n);
    for (int64_t i = 0; i < h.texts; ++i)
      for (int64_t j = 0; j < n; ++j) to[i * n + j] *= s.inverse[i];
  };
  multiply_unit(h.items, columns_of(s.image, h.dim), s.dots);
  if (h.adapts_text) multiply_unit(h.columns, rows_of(h.last, h.columns), s.text_dots);
}

// [B, C] in the dtype of the logits, from [C, ld].
inline void write_logits(const MultimodalForward& p, const float* logits, int64_t ld) {
  with_type({p.logits, p.out_dtype}, [&](auto* to) {
    for (int64_t item = 0; item < p.items; item += kLanes)
      for (int64_t text = 0; text < p.texts; text += kLanes) {
        Vec block[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          block[i] =
              text + i < p.texts ? load(logits + (text + i) * ld + item, p.items - item) : Vec{};
        transpose(block);
        for (int64_t i = 0; i < least(kLanes, p.items - item); ++i)
          store(to + (item + i) * p.texts + text, block[i], p.texts - text);
      }
  });
}

struct ForwardArrays {
  Head h;
  int64_t ld;
  float* state;
  PackedTexts packed;
  Pairs pairs;
  Separate separate;
  float *activated, *mean, *e, *logits;
  double* gram;

  ForwardArrays(Carver& c, const MultimodalForward& p)
      : h(c, p),
        ld(round_up(h.items, kLanes)),
        state(p.state ? p.state : c.take<float>(MultimodalState(p, nullptr).size)),
        packed(c, h, false),
        pairs(c, h),
        separate(c, h),
        activated(c.take<float>(greatest(h.texts, h.items) * h.down_hidden)),
        mean(c.take<float>(h.width)),
        e(c.take<float>(h.items * h.columns)),
        logits(c.take<float>(h.texts * ld)),
        gram(c.take<double>((gram_ld(h) + kGramRows) * gram_ld(h))) {}
};

inline void forward(const MultimodalForward& p, const MultimodalState& saved,
                    const Threads& threads) {
  auto a = carve<ForwardArrays>(shared_scratch(), p);
  const Head& h = a.h;
  MultimodalState s = p.state ? saved : MultimodalState(p, a.state);
  // What an option leaves out holds nothing, not whatever was there.
  bool complete = h.hidden == Hidden::pair && h.sees[1][0] && h.sees[1][1];
  if (p.state && !complete) std::memset(p.state, 0, s.size * sizeof(float));
  project(h, p, threads, s, a.activated);
  if (h.last_query > h.first_query) {
    a.packed.fill(h, threads, s.qkv);
    attend(h, a.packed, threads, s);
  }
  finish_images(h, s, threads, p, a.e);
  find_center(h, s, a.mean);
  center_last_layer(h, s);
  finish_texts(h, s, threads, a.gram);
  if (!h.adapts_text) {
    for (int64_t i = 0; i < h.texts; ++i)
      for (int64_t j = 0; j < h.items; ++j)
        a.logits[i * a.ld + j] = h.logit_scale * s.dots[i * h.items + j];
  } else if (h.hidden == Hidden::pair) {
    a.pairs.fill(h, s, threads);
    pair_forward(h, a.pairs, s, threads, a.logits);
  } else {
    a.separate.fill(h, s, threads);
    separate_forward(h, a.separate, s, threads, a.logits);
  }
  write_logits(p, a.logits, a.ld);
}

}  // namespace
}  // namespace fastadapters::cpu

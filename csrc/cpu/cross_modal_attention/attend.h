// Attention of a tile of queries over keys, and its gradient, without a score in memory but for
// those of the tile and kKeys keys.
#pragma once

#include "heads.h"

namespace fastadapters::cpu {
namespace {

// Keys and values of one head. Rows are [n, ld].
struct Keys {
  int64_t n = 0;
  float *rows = nullptr, *turned = nullptr;               // keys
  float *value_rows = nullptr, *turned_values = nullptr;  // values
};

inline void forget_padding(float* row, int64_t n, int64_t vectors, float with) {
  for (int64_t k = n; k < vectors * kLanes; ++k) row[k] = with;
}

// out [rows, ld] and the softmax of rows <= kTile scaled queries. `scores` holds a block of rows.
inline void attend(const Sizes& s, const Keys& keys, int64_t rows, const float* q, float* scores,
                   float* out, const Softmax& softmax) {
  float *top = softmax.top, total[kTile];
  for (int64_t i = 0; i < rows; ++i) {
    top[i] = -kInfinity;
    total[i] = 0;
    std::memset(out + i * s.ld, 0, s.vectors * sizeof(Vec));
  }
  for (int64_t first = 0; first < keys.n; first += kKeys) {
    int64_t n = least(kKeys, keys.n - first), vectors = divide_up(n, kLanes);
    for (int64_t i = 0; i < rows; i += kRows) {
      int64_t block = least(kRows, rows - i);
      multiply_long<false, false>(block, vectors, s.d, q + i * s.ld, s.ld,
                                  keys.turned + first * s.d, kKeys, scores, kScores);
      for (int64_t r = i; r < i + block; ++r) {
        float* row = scores + (r - i) * kScores;
        forget_padding(row, n, vectors, -kInfinity);
        Vec most = read<Vec>(row);
        for (int64_t k = kLanes; k < n; k += kLanes) most = larger(read<Vec>(row + k), most);
        float next = std::fmax(top[r], largest(most));
        float keep = exp(broadcast(top[r] - next))[0];
        Vec sum = {};
        for (int64_t k = 0; k < n; k += kLanes) {
          Vec p = exp(read<Vec>(row + k) - next);
          sum += p;
          store(row + k, p);
        }
        total[r] = total[r] * keep + cpu::sum(sum);
        top[r] = next;
        for (int64_t j = 0; first > 0 && j < s.vectors * kLanes; j += kLanes)
          store(out + r * s.ld + j, read<Vec>(out + r * s.ld + j) * keep);
      }
      multiply<false, true>(block, s.vectors, n, scores, kScores, keys.value_rows + first * s.ld,
                            s.ld, out + i * s.ld, s.ld);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    softmax.factor[i] = 1 / total[i];
    for (int64_t j = 0; j < s.vectors * kLanes; j += kLanes)
      store(out + i * s.ld + j, read<Vec>(out + i * s.ld + j) * softmax.factor[i]);
  }
}

// The dot products of rows [n <= kLanes, ld] with others: row r with the one `step * r` further.
inline Vec dots(const Sizes& s, int64_t n, const float* rows, const float* others, int64_t step) {
  Vec part[kLanes] = {};
  for (int64_t r = 0; r < n; ++r)
    for (int64_t j = 0; j < s.vectors * kLanes; j += kLanes)
      part[r] += read<Vec>(rows + r * s.ld + j) * read<Vec>(others + r * step + j);
  return sum_each(part);
}

// What `differentiate` reads of its queries, [rows, ld] or [rows]: with `out` as their attention
// over these keys alone, the gradient by a score is its weight times
//
//     d_out . v - d_out . out - beyond
//
// where `beyond` is what they lose to other keys. Where all keys are in one block d_out . out is
// the sum of the very products that it is taken off, and cancels as exactly as they do.
struct Queries {
  int64_t rows;
  const float *q, *d_out, *out;
  Softmax softmax;
  const float* beyond;
  bool single;  // whether they see no other key than one
};

// Adds to dq, of scaled queries, and to the gradients of keys and values; each may be null.
// `weights` and `d_scores` are [kTile, kScores].
inline void differentiate(const Sizes& s, const Keys& keys, const Queries& queries, float* weights,
                          float* d_scores, float* dq, float* dk, float* dv) {
  const int64_t rows = queries.rows;
  const Softmax& softmax = queries.softmax;
  const bool scores = !queries.single && (dq || dk), one_block = keys.n <= kKeys;
  float means[kTile + kLanes];
  for (int64_t i = 0; scores && !one_block && i < rows; i += kLanes)
    store(means + i,
          dots(s, least(kLanes, rows - i), queries.d_out + i * s.ld, queries.out + i * s.ld, s.ld));
  for (int64_t first = 0; first < keys.n; first += kKeys) {
    int64_t n = least(kKeys, keys.n - first), vectors = divide_up(n, kLanes);
    multiply_long<false, false>(rows, vectors, s.d, queries.q, s.ld, keys.turned + first * s.d,
                                kKeys, weights, kScores);
    for (int64_t i = 0; i < rows; ++i) {
      float* row = weights + i * kScores;
      const float top = softmax.top[i], factor = softmax.factor[i];
      forget_padding(row, n, vectors, -kInfinity);
      for (int64_t k = 0; k < n; k += kLanes)
        store(row + k, exp(read<Vec>(row + k) - top) * factor);
    }
    if (dv)
      multiply<true, true>(n, s.vectors, rows, weights, kScores, queries.d_out, s.ld,
                           dv + first * s.ld, s.ld);
    if (!scores) continue;
    multiply_long<false, false>(rows, vectors, s.d, queries.d_out, s.ld,
                                keys.turned_values + first * s.d, kKeys, d_scores, kScores);
    for (int64_t i = 0; i < rows; ++i) {
      float *row = d_scores + i * kScores, *p = weights + i * kScores;
      Vec products = {};
      for (int64_t k = 0; one_block && k < n; k += kLanes)
        products += read<Vec>(p + k) * read<Vec>(row + k);
      const float mean = one_block ? cpu::sum(products) : means[i], beyond = queries.beyond[i];
      for (int64_t k = 0; k < n; k += kLanes)
        store(row + k, read<Vec>(p + k) * (read<Vec>(row + k) - mean - beyond));
    }
    if (dq)
      multiply_long<false, true>(rows, s.vectors, n, d_scores, kScores, keys.rows + first * s.ld,
                                 s.ld, dq, s.ld);
    if (dk)
      multiply<true, true>(n, s.vectors, rows, d_scores, kScores, queries.q, s.ld,
                           dk + first * s.ld, s.ld);
  }
}

// A tile of text queries: each sees the texts, by what attention over them gave it, and the image
// keys of each item. Rows of turned queries and of weights are kTexts apart.
constexpr int64_t kTexts = kTile + 16;

// For the image keys [items * images, ld] of some items, the weights [items * images, kTexts] that
// each text gives them, and [items, kTexts] those it gives all texts. softmax: of its scores with
// the texts, padded to whole vectors.
inline void weigh(const Sizes& s, int64_t texts, const float* turned_q, const Softmax& softmax,
                  int64_t items, const float* keys, float* weights, float* text_weights) {
  int64_t images = s.sees[0][1] ? s.images : 0;
  if (images)
    multiply_long<false, false>(items * images, divide_up(texts, kLanes), s.d, keys, s.ld, turned_q,
                                kTexts, weights, kTexts);
  for (int64_t item = 0; item < items; ++item)
    for (int64_t c = 0; c < texts; c += kLanes) {
      float* of_item = weights + item * images * kTexts + c;
      float* of_texts = text_weights + item * kTexts + c;
      Vec text = s.sees[0][0] ? read<Vec>(softmax.top + c) - s.shift[0] : Vec{};
      Vec top = s.sees[0][0] ? text : read<Vec>(of_item);
      for (int64_t i = 0; i < images; ++i) top = larger(read<Vec>(of_item + i * kTexts), top);
      text = s.sees[0][0] ? exp(text - top) / read<Vec>(softmax.factor + c) : Vec{};
      Vec total = sum_of(text, 0, images, [=](int64_t i) {
        Vec p = exp(read<Vec>(of_item + i * kTexts) - top);
        store(of_item + i * kTexts, p);
        return p;
      });
      Vec share = 1 / total;
      for (int64_t i = 0; i < images; ++i)
        store(of_item + i * kTexts, read<Vec>(of_item + i * kTexts) * share);
      store(of_texts, text * share);
    }
}

}  // namespace
}  // namespace fastadapters::cpu

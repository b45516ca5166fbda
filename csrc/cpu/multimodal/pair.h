// The pairs of a text and an image where what the adapter makes of a text depends on both. A tile
// is kTexts texts by kLanes images, the images in the lanes: a row of a tile, [kTexts, kLanes], is
// a row of a panel of product.h.
//
//     z = sum over heads of v from_text + w from_image      w = 1 - v = sigmoid(odds)
//     e = gelu(z) - center    |u|^2 = |L (e ; 1)|^2    u.t = text_dots . (e ; 1)    u.i =
//     image_dots . (e ; 1)
#pragma once

#include "cosine.h"

namespace fastadapters::cpu {
namespace {

constexpr int kTexts = 3;
constexpr int kPairRows = block_rows(kTexts);
constexpr int64_t kTile = kTexts * kLanes;
constexpr int64_t kTextBlock = 16 * kTexts;  // texts that meet an image before the next ones

// What pairs are made of, besides the state.
struct Pairs {
  int64_t ld;         // of a row of images, whole vectors
  int64_t inner;      // R, whole vectors
  int64_t columns;    // R + 1, whole vectors
  float* odds;        // [H, C, ld]: q.k, in backward to become their gradient
  float* from_text;   // [C, H, inner]
  float* from_image;  // [B, H, inner]
  float* image_dots;  // [B, columns]: unit image times (W | b)

  static bool wanted(const Head& h) { return h.adapts_text && h.hidden == Hidden::pair; }

  Pairs(Carver& c, const Head& h)
      : ld(round_up(h.items, kLanes)),
        inner(round_up(h.inner, kLanes)),
        columns(round_up(h.columns, kLanes)),
        odds(c.take<float>(h.heads * h.texts * ld, wanted(h))),
        from_text(c.take<float>(h.texts * h.heads * inner, wanted(h))),
        from_image(c.take<float>(h.items * h.heads * inner, wanted(h))),
        image_dots(c.take<float>(h.items * columns, wanted(h))) {}

  void fill(const Head& h, const MultimodalState& s, const Threads& threads) const {
    int64_t qkv = 3 * h.width, head_size = h.heads * inner;
    std::memset(from_text, 0, h.texts * head_size * sizeof(float));
    std::memset(from_image, 0, h.items * head_size * sizeof(float));
    std::memset(image_dots, 0, h.items * columns * sizeof(float));
    std::memset(odds, 0, h.heads * h.texts * ld * sizeof(float));
    const float* image_qkv = s.qkv + h.texts * qkv;
    for (int64_t i = 0; i < h.heads; ++i) {
      int64_t at = i * h.head;
      View weight = columns_of(h.inner_weight + at, h.width);
      multiply(threads, h.texts, h.items, h.head, rows_of(s.qkv + at, qkv),
               columns_of(image_qkv + h.width + at, qkv), odds + i * h.texts * ld, ld);
      multiply(threads, h.texts, h.inner, h.head, rows_of(s.attended + at, h.width), weight,
               from_text + i * inner, head_size);
      multiply(threads, h.items, h.inner, h.head, rows_of(image_qkv + 2 * h.width + at, qkv),
               weight, from_image + i * inner, head_size);
    }
    // A head's two weights sum to one: its share of the constant fits in.
    auto add_share = [&](int64_t n, float* rows) {
      for (int64_t i = 0; i < n * h.heads; ++i)
        for (int64_t j = 0; j < h.inner; ++j) rows[i * inner + j] += h.inner_bias[j] / h.heads;
    };
    add_share(h.texts, from_text);
    add_share(h.items, from_image);
    multiply(threads, h.items, h.columns, h.dim, rows_of(s.image, h.dim),
             rows_of(h.last, h.columns), image_dots, columns);
  }
};

// A tile's rows, and the rows of its images.
struct PairTile {
  float *from_image, *image_dots;     // [H * inner, kLanes], [columns, kLanes]
  float *text_weight, *image_weight;  // v, w [H, kTile]
  float* e;                           // [inner, kTile]
  float *slope, *form;                // of the activation, L (e ; 1): the same

  PairTile(Carver& c, const Head& h, const Pairs& p, bool backward)
      : from_image(c.take<float>(h.heads * p.inner * kLanes)),
        image_dots(c.take<float>(p.columns * kLanes)),
        text_weight(c.take<float>(h.heads * kTile)),
        image_weight(c.take<float>(h.heads * kTile)),
        e(c.take<float>(p.inner * kTile)),
        slope(c.take<float>(p.inner * kTile, backward)),
        form(c.take<float>(p.inner * kTile, backward)) {}
};

// n rows of whole vectors, the first kLanes at most, as columns; 0 beyond.
inline void rows_to_lanes(int64_t n, int64_t columns, const float* rows, int64_t ld, float* out) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec block[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) block[i] = i < n ? read<Vec>(rows + i * ld + j) : Vec{};
    transpose(block);
    for (int64_t i = 0; i < kLanes; ++i) store(out + (j + i) * kLanes, block[i]);
  }
}

inline void load_images(const Head& h, const Pairs& p, int64_t item, PairTile& t) {
  int64_t n = h.items - item, size = h.heads * p.inner;
  rows_to_lanes(n, size, p.from_image + item * size, size, t.from_image);
  rows_to_lanes(n, p.columns, p.image_dots + item * p.columns, p.columns, t.image_dots);
}

// The weights of a text and an image, and from them z. Texts beyond the last one repeat it.
inline void mix_pairs(const Head& h, const Pairs& p, const MultimodalState& s, int64_t text,
                      int64_t item, PairTile& t) {
  for (int64_t i = 0; i < kTexts; ++i) {
    int64_t c = least(text + i, h.texts - 1);
    for (int64_t head = 0; head < h.heads; ++head) {
      Vec x = read<Vec>(p.odds + (head * h.texts + c) * p.ld + item) * h.scale +
              (h.text_odds - s.lse[c * h.heads + head]);
      Vec small = exp(-absolute(x)), large = 1.0f / (1.0f + small);
      small *= large;
      store(t.image_weight + head * kTile + i * kLanes, x > 0 ? large : small);
      store(t.text_weight + head * kTile + i * kLanes, x > 0 ? small : large);
    }
    for (int64_t r = 0; r < p.inner; r += kLanes) {
      Vec z[kLanes] = {};
      for (int64_t head = 0; head < h.heads; ++head) {
        Vec w = read<Vec>(t.image_weight + head * kTile + i * kLanes);
        Vec v = read<Vec>(t.text_weight + head * kTile + i * kLanes);
        const float* from_image = t.from_image + (head * p.inner + r) * kLanes;
        const float* from_text = p.from_text + (c * h.heads + head) * p.inner + r;
#pragma GCC unroll 16
        for (int k = 0; k < kLanes; ++k) {
          z[k] = w * read<Vec>(from_image + k * kLanes) + z[k];
          z[k] = v * from_text[k] + z[k];
        }
      }
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) store(t.e + (r + k) * kTile + i * kLanes, z[k]);
    }
  }
}

template <bool backward>
inline void activate_pairs(const Head& h, const MultimodalState& s, PairTile& t) {
  for (int64_t r = 0; r < h.inner; ++r)
#pragma GCC unroll 8
    for (int64_t i = r * kTile; i < (r + 1) * kTile; i += kLanes) {
      Vec z = read<Vec>(t.e + i);
      Activated a = h.gelu ? gelu(z) : Activated{z, broadcast(1)};
      store(t.e + i, a.value - s.center[r]);
      if (backward) store(t.slope + i, a.derivative);
    }
}

// The products of each text of a tile with its images.
template <bool backward>
inline void finish_pairs(const Head& h, const MultimodalState& s, int64_t text, int64_t item,
                         PairTile& t, Products (&out)[kTexts]) {
  int64_t r = h.inner, n = h.columns;
  const float* text_dots[kTexts];
  float corner = s.form[n * n - 1];
  for (int i = 0; i < kTexts; ++i) {
    int64_t c = least(text + i, h.texts - 1);
    text_dots[i] = s.text_dots + c * n;
    Vec dot = load(s.dots + c * h.items + item, h.items - item);
    out[i] = {broadcast(corner * corner), broadcast(text_dots[i][r]),
              read<Vec>(t.image_dots + r * kLanes), dot, broadcast(text_square(h, s, c))};
  }
  for (int64_t row = 0; row < r; row += kPairRows)
    with_constant<kPairRows>(least(kPairRows, r - row), [&](auto of_rows) {
      constexpr int rows = of_rows;
      Vec f[rows][kTexts], square[kTexts] = {};
#pragma GCC unroll 8
      for (int j = 0; j < rows; ++j)
#pragma GCC unroll 8
        for (int i = 0; i < kTexts; ++i) f[j][i] = broadcast(s.form[(row + j) * n + r]);
      add_product(r - row, rows_of(s.form + row * n + row, n), t.e + row * kTile, kTile, f);
#pragma GCC unroll 8
      for (int j = 0; j < rows; ++j)
#pragma GCC unroll 8
        for (int i = 0; i < kTexts; ++i) {
          square[i] = f[j][i] * f[j][i] + square[i];
          if (backward) store(t.form + (row + j) * kTile + i * kLanes, f[j][i]);
        }
#pragma GCC unroll 8
      for (int i = 0; i < kTexts; ++i) out[i].square += square[i];
    });
  // In chains no longer than those of a dot product in vectors.
  constexpr int64_t chain = 8;
  for (int64_t begin = 0; begin < r; begin += chain) {
    Vec text_dot[kTexts] = {}, image_dot[kTexts] = {};
    for (int64_t row = begin; row < least(begin + chain, r); ++row) {
      Vec of_image = read<Vec>(t.image_dots + row * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kTexts; ++i) {
        Vec e = read<Vec>(t.e + row * kTile + i * kLanes);
        text_dot[i] = e * text_dots[i][row] + text_dot[i];
        image_dot[i] = e * of_image + image_dot[i];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTexts; ++i) {
      out[i].text_dot += text_dot[i];
      out[i].image_dot += image_dot[i];
    }
  }
}

// tile(task, text, item) for each tile of a range of texts; images(task, item) comes before those
// of a block of texts, after(task, item) behind them.
template <class Images, class Visit, class After>
inline void visit_tiles(const Head& h, int64_t begin, int64_t end, const Images& images,
                        const Visit& tile, const After& after) {
  for (int64_t block = begin; block < end; block += kTextBlock)
    for (int64_t item = 0; item < h.items; item += kLanes) {
      images(item);
      for (int64_t text = block; text < least(block + kTextBlock, end); text += kTexts)
        tile(text, item);
      after(item);
    }
}

// Ranges of texts for tasks that are worth it.
inline int64_t pair_tasks(const Head& h, const Threads& threads) {
  int64_t worthwhile = h.texts * h.items * (h.inner + 8) >> 14;
  return greatest(1, least(least(threads.count, worthwhile), h.texts / kTexts));
}
inline int64_t first_text(const Head& h, int64_t task, int64_t tasks) {
  return task == tasks ? h.texts : h.texts / kTexts * task / tasks * kTexts;
}

// logits [C, ld]
inline void pair_forward(const Head& h, const Pairs& p, const MultimodalState& s,
                         const Threads& threads, float* logits) {
  int64_t tasks = pair_tasks(h, threads);
  parallel(threads, tasks, [&](int64_t task) {
    auto t = carve<PairTile>(task_scratch(), h, p, false);
    visit_tiles(
        h, first_text(h, task, tasks), first_text(h, task + 1, tasks),
        [&](int64_t item) { load_images(h, p, item, t); },
        [&](int64_t text, int64_t item) {
          Products products[kTexts];
          mix_pairs(h, p, s, text, item, t);
          activate_pairs<false>(h, s, t);
          finish_pairs<false>(h, s, text, item, t, products);
          for (int i = 0; i < kTexts && text + i < h.texts; ++i)
            store(logits + (text + i) * p.ld + item, logit(h, products[i]));
        },
        [](int64_t) {});
  });
}

}  // namespace
}  // namespace fastadapters::cpu

// Backward of the pairs, recomputed tile by tile. Sums over many pairs go through levels, so that
// no chain of additions is long: a tile, a block of texts and images, some such blocks, in double
// all of a task, all tasks in their order.
#pragma once

#include "../totals.h"
#include "needs.h"
#include "pair.h"

namespace fastadapters::cpu {
namespace {

constexpr int64_t kJoinedTexts = Totals::kRows / kTextBlock * kTextBlock;

// What a task sums over its texts.
struct PairSums {
  float *from_image, *image_dots;  // [B, H, inner], [B, columns]
  Totals of_from_image, of_image_dots;
  float* some_form;       // [inner, inner]: sum of d|u|^2 e e^T over some images
  double* form;           // [inner, inner]: over all
  double *bell, *corner;  // [inner], [1]: sums of d|u|^2 e and of d|u|^2
  double *scale, *share;  // [1]

  PairSums(Carver& c, const Head& h, const Pairs& p)
      : from_image(c.take<float>(h.items * h.heads * p.inner)),
        image_dots(c.take<float>(h.items * p.columns)),
        of_from_image(c, h.items * h.heads * p.inner, h.texts > kJoinedTexts),
        of_image_dots(c, h.items * p.columns, h.texts > kJoinedTexts),
        some_form(c.take<float>(p.inner * p.inner)),
        form(c.take<double>(p.inner * p.inner)),
        bell(c.take<double>(p.inner)),
        corner(c.take<double>(1)),
        scale(c.take<double>(1)),
        share(c.take<double>(1)) {}
};

struct PairBackwardArrays {
  int64_t tasks;
  size_t bytes = 0;               // of a task's sums
  float *from_text, *from_image;  // gradients [C, H, inner], [B, H, inner]
  char* sums;

  PairBackwardArrays(Carver& c, const Head& h, const Pairs& p, const Threads& threads)
      : tasks(pair_tasks(h, threads)) {
    bool wanted = Pairs::wanted(h);
    Carver counter;
    PairSums(counter, h, p);
    bytes = counter.used;
    from_text = c.take<float>(h.texts * h.heads * p.inner, wanted);
    from_image = c.take<float>(h.items * h.heads * p.inner, wanted);
    sums = c.take<char>(tasks * int64_t(bytes), wanted);
  }

  PairSums of(const Head& h, const Pairs& p, int64_t task) const {
    Carver c{sums + task * int64_t(bytes), 0};
    return PairSums(c, h, p);
  }
};

// A tile, and the sums over those of a block of texts with the same images, images in the lanes.
struct PairBackwardTile : PairTile {
  float *weighted, *dz;                // d|u|^2 e, dz [inner, kTile]
  float *e_rows, *dz_rows;             // e, dz as [kTile, inner]
  float *d_from_image, *d_image_dots;  // [H * inner, kLanes], [columns, kLanes]
  float *gram, *bell;  // sums of weighted e^T [inner, inner], of weighted [inner, kLanes]
  Vec corner = {}, scale = {}, share = {};
  // Of a block of texts over all images.
  Totals from_text, text_dots, text_square;

  PairBackwardTile(Carver& c, const Head& h, const Pairs& p)
      : PairTile(c, h, p, true),
        weighted(c.take<float>(p.inner * kTile)),
        dz(c.take<float>(p.inner * kTile)),
        e_rows(c.take<float>(kTile * p.inner)),
        dz_rows(c.take<float>(kTile * p.inner)),
        d_from_image(c.take<float>(h.heads * p.inner * kLanes)),
        d_image_dots(c.take<float>(p.columns * kLanes)),
        gram(c.take<float>(p.inner * p.inner)),
        bell(c.take<float>(p.inner * kLanes)),
        from_text(c, kTextBlock * h.heads * p.inner, h.items > Totals::kRows),
        text_dots(c, kTextBlock * p.columns, h.items > Totals::kRows),
        text_square(c, kTextBlock, h.items > Totals::kRows) {
    if (c.base) std::memset(weighted, 0, (char*)(bell + p.inner * kLanes) - (char*)weighted);
  }
};

// dz, and what is summed of e and d|u|^2, from the gradients by the products.
inline void pair_hidden_backward(const Head& h, const MultimodalState& s,
                                 const Products (&by)[kTexts],
                                 const float* const (&text_dots)[kTexts], PairBackwardTile& t) {
  int64_t n = h.columns;
  for (int64_t row = 0; row < h.inner; row += kPairRows)
    with_constant<kPairRows>(least(kPairRows, h.inner - row), [&](auto of_rows) {
      constexpr int rows = of_rows;
      Vec g[rows][kTexts] = {};
      add_product(row + rows, columns_of(s.form + row, n), t.form, kTile, g);
#pragma GCC unroll 8
      for (int j = 0; j < rows; ++j) {
        int64_t r = row + j;
        Vec image_dot = read<Vec>(t.image_dots + r * kLanes);
        Vec bell = read<Vec>(t.bell + r * kLanes);
        Vec d_image_dot = read<Vec>(t.d_image_dots + r * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kTexts; ++i) {
          int64_t at = r * kTile + i * kLanes;
          Vec e = read<Vec>(t.e + at), weighted = by[i].square * e;
          Vec de = 2.0f * by[i].square * g[j][i] + by[i].text_dot * text_dots[i][r] +
                   by[i].image_dot * image_dot;
          store(t.dz + at, de * read<Vec>(t.slope + at));
          store(t.weighted + at, weighted);
          bell += weighted;
          d_image_dot += by[i].image_dot * e;
        }
        store(t.bell + r * kLanes, bell);
        store(t.d_image_dots + r * kLanes, d_image_dot);
      }
    });
}

// [inner, kTile] as [kTile, inner].
inline void lanes_to_rows(int64_t inner, const float* lanes, float* rows) {
  for (int64_t r = 0; r < inner; r += kLanes)
    for (int64_t i = 0; i < kTile; i += kLanes) {
      Vec block[kLanes];
      for (int64_t k = 0; k < kLanes; ++k) block[k] = read<Vec>(lanes + (r + k) * kTile + i);
      transpose(block);
      for (int64_t k = 0; k < kLanes; ++k) store(rows + (i + k) * inner + r, block[k]);
    }
}

// C [m, columns from `first` on] += A B for rows of B that are `inner` apart.
inline void add_rows(int64_t m, int64_t inner, int64_t first, int64_t k, View a, const float* b,
                     float* c) {
  Panels<kPanelVectors> panels(inner - first);
  for (int64_t p = 0; p < panels.count; ++p) {
    int64_t column = first + panels.first(p) * kLanes;
    multiply_panel(panels.size(p), m, panels.size(p) * kLanes, k, a, b + column, inner, c + column,
                   inner, true);
  }
}

// The gradients by the odds, in place of them, and by what the weights mix.
inline void mix_pairs_backward(const Head& h, const Pairs& p, int64_t text, int64_t item,
                               float* d_from_text, PairBackwardTile& t) {
  lanes_to_rows(p.inner, t.dz, t.dz_rows);
  for (int64_t i = 0; i < least(kTexts, h.texts - text); ++i)
    add_rows(h.heads, p.inner, 0, kLanes, rows_of(t.text_weight + i * kLanes, kTile),
             t.dz_rows + i * kLanes * p.inner, d_from_text + (text + i) * h.heads * p.inner);
  for (int64_t head = 0; head < h.heads; ++head) {
    const float* from_text[kTexts];
    Vec w[kTexts], slope[kTexts] = {};
#pragma GCC unroll 8
    for (int i = 0; i < kTexts; ++i) {
      from_text[i] = p.from_text + (least(text + i, h.texts - 1) * h.heads + head) * p.inner;
      w[i] = read<Vec>(t.image_weight + head * kTile + i * kLanes);
    }
    for (int64_t r = 0; r < h.inner; ++r) {
      int64_t at = (head * p.inner + r) * kLanes;
      Vec from_image = read<Vec>(t.from_image + at), gradient = read<Vec>(t.d_from_image + at);
#pragma GCC unroll 8
      for (int i = 0; i < kTexts; ++i) {
        Vec dz = read<Vec>(t.dz + r * kTile + i * kLanes);
        gradient = w[i] * dz + gradient;
        slope[i] = dz * (from_image - from_text[i][r]) + slope[i];
      }
      store(t.d_from_image + at, gradient);
    }
    for (int i = 0; i < kTexts && text + i < h.texts; ++i)
      store(p.odds + (head * h.texts + text + i) * p.ld + item,
            slope[i] * w[i] * read<Vec>(t.text_weight + head * kTile + i * kLanes));
  }
}

inline void pair_tile_backward(const Head& h, const Pairs& p, const MultimodalState& s,
                               const Needs& needs, const PairGradients& g, int64_t text,
                               int64_t item, float* d_from_text, PairBackwardTile& t) {
  Products products[kTexts], by[kTexts];
  mix_pairs(h, p, s, text, item, t);
  activate_pairs<true>(h, s, t);
  finish_pairs<true>(h, s, text, item, t, products);

  const float* text_dots[kTexts];
  Vec d_image_dot = {};
  for (int i = 0; i < kTexts; ++i) {
    int64_t c = text + i;
    bool exists = c < h.texts;
    text_dots[i] = s.text_dots + least(c, h.texts - 1) * h.columns;
    auto d = cosine_backward(h, products[i], exists ? read<Vec>(g.dots + c * g.ld + item) : Vec{});
    by[i] = d.by;
    if (exists) {
      store(g.dots + c * g.ld + item, by[i].dot);
      g.text_square[c] += sum(by[i].text_square);
      g.text_dots[c * g.padded + h.inner] += sum(by[i].text_dot);
    }
    t.corner += by[i].square;
    t.scale += d.scale;
    t.share += d.share;
    d_image_dot += by[i].image_dot;
  }
  float* total = t.d_image_dots + h.inner * kLanes;
  store(total, read<Vec>(total) + d_image_dot);

  pair_hidden_backward(h, s, by, text_dots, t);
  lanes_to_rows(p.inner, t.e, t.e_rows);
  for (int64_t row = 0; needs.last && row < h.inner; row += kLanes)
    add_rows(least(kLanes, h.inner - row), p.inner, row, kTile,
             rows_of(t.weighted + row * kTile, kTile), t.e_rows, t.gram + row * p.inner);
  for (int i = 0; i < kTexts && text + i < h.texts; ++i)
    for (int64_t r = 0; r < h.inner; r += kLanes) {
      float* to = g.text_dots + (text + i) * g.padded + r;
      Vec v = {};
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k)
        v = by[i].text_dot[k] * read<Vec>(t.e_rows + (i * kLanes + k) * p.inner + r) + v;
      store(to, load(to, h.inner - r) + v, h.inner - r);
    }
  if (needs.hidden) mix_pairs_backward(h, p, text, item, d_from_text, t);
}

// Adds [columns, kLanes] to n rows, the first kLanes at most, and clears it.
inline void drain_lanes(int64_t n, int64_t columns, float* lanes, float* rows) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec block[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) block[i] = read<Vec>(lanes + (j + i) * kLanes);
    transpose(block);
    for (int64_t i = 0; i < least(n, kLanes); ++i)
      store(rows + i * columns + j, read<Vec>(rows + i * columns + j) + block[i]);
  }
  std::memset(lanes, 0, columns * kLanes * sizeof(float));
}

template <class From, class To>
inline void drain(int64_t n, From* from, To* to) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
  std::memset(from, 0, n * sizeof(From));
}

// From the gradients of the logits in g.dots: all of g, d_from_text and d_from_image, and the
// gradients by the odds, in place of them.
inline void pair_backward(const Head& h, const Pairs& p, const MultimodalState& s,
                          const Needs& needs, const Threads& threads, const PairBackwardArrays& a,
                          PairGradients& g) {
  int64_t head_size = h.heads * p.inner, square = p.inner * p.inner;
  std::memset(a.from_text, 0, h.texts * head_size * sizeof(float));
  parallel(threads, a.tasks, [&](int64_t task) {
    auto t = carve<PairBackwardTile>(task_scratch(), h, p);
    PairSums sums = a.of(h, p, task);
    std::memset((char*)sums.from_image, 0, a.bytes);
    int64_t begin = first_text(h, task, a.tasks), end = first_text(h, task + 1, a.tasks);
    for (int64_t block = begin; block < end; block += kTextBlock) {
      int64_t texts = least(kTextBlock, end - block);
      // f(totals, sums of the block of texts, how many) for each of them
      auto each_sum = [&](const auto& f) {
        f(t.from_text, a.from_text + block * head_size, texts * head_size);
        f(t.text_dots, g.text_dots + block * g.padded, texts * g.padded);
        f(t.text_square, g.text_square + block, texts);
      };
      each_sum([](const Totals& totals, float*, int64_t) { totals.clear(); });
      for (int64_t item = 0; item < h.items; item += kLanes) {
        load_images(h, p, item, t);
        for (int64_t text = block; text < block + texts; text += kTexts)
          pair_tile_backward(h, p, s, needs, g, text, item, a.from_text, t);
        int64_t n = h.items - item;
        drain_lanes(n, head_size, t.d_from_image, sums.from_image + item * head_size);
        drain_lanes(n, p.columns, t.d_image_dots, sums.image_dots + item * p.columns);
        drain(square, t.gram, sums.some_form);
        for (int64_t r = 0; r < h.inner; ++r) {
          sums.bell[r] += sum(read<Vec>(t.bell + r * kLanes));
          store(t.bell + r * kLanes, Vec{});
        }
        *sums.corner += sum(t.corner);
        *sums.scale += sum(t.scale);
        *sums.share += sum(t.share);
        t.corner = t.scale = t.share = Vec{};
        if ((item + kLanes) % Totals::kRows) continue;
        drain(square, sums.some_form, sums.form);
        each_sum([](const Totals& totals, float* sums, int64_t n) { totals.join(sums, n); });
      }
      drain(square, sums.some_form, sums.form);
      each_sum([](const Totals& totals, float* sums, int64_t n) { totals.finish(sums, n); });
      if ((block + kTextBlock - begin) % kJoinedTexts) continue;
      sums.of_from_image.join(sums.from_image);
      sums.of_image_dots.join(sums.image_dots);
    }
    sums.of_from_image.finish(sums.from_image);
    sums.of_image_dots.finish(sums.image_dots);
  });

  PairSums total = a.of(h, p, 0);
  for (int64_t task = 1; task < a.tasks; ++task) {
    PairSums sums = a.of(h, p, task);
    drain(h.items * head_size, sums.from_image, total.from_image);
    drain(h.items * p.columns, sums.image_dots, total.image_dots);
    drain(square, sums.form, total.form);
    for (int64_t r = 0; r < h.inner; ++r) total.bell[r] += sums.bell[r];
    *total.corner += *sums.corner;
    *total.scale += *sums.scale;
    *total.share += *sums.share;
  }
  std::memcpy(a.from_image, total.from_image, h.items * head_size * sizeof(float));
  std::memcpy(g.image_dots, total.image_dots, h.items * p.columns * sizeof(float));
  for (int64_t i = 0; i < h.inner; ++i) {
    for (int64_t j = i; j < h.inner; ++j)
      g.form[i * g.padded + j] = g.form[j * g.padded + i] = float(2 * total.form[i * p.inner + j]);
    g.form[i * g.padded + h.inner] = g.form[h.inner * g.padded + i] = float(2 * total.bell[i]);
  }
  g.form[h.inner * g.padded + h.inner] = float(2 * *total.corner);
  g.scale = *total.scale;
  g.share = *total.share;
}

}  // namespace
}  // namespace fastadapters::cpu

// Forward: a tile of queries meets all of its keys and is written once.
//
//     text queries:  attention over the texts, whatever the item; then for each item the images,
//                    merged by log-sum-exp
//     image queries: those of all items over the texts as one matrix; then over their own images
#pragma once

#include "attend.h"
#include "cross_modal_attention.h"

namespace fastadapters::cpu {
namespace {

struct ForwardTask {
  Keys texts, images, own;  // own: of one item
  float *q, *turned_q, *out, *own_out, *scores, *weights, *text_weights;
  Softmax softmax, own_softmax;
  ForwardTask(Carver& c, const Sizes& s) {
    auto keys = [&](int64_t n) {
      Keys k;
      k.rows = c.take<float>((n + kRows) * s.ld);
      k.value_rows = c.take<float>(n * s.ld);
      return k;
    };
    texts = keys(s.text_keys() ? s.texts : 0);
    texts.turned = c.take<float>(turned_size(s, s.texts), s.text_keys());
    images = keys(s.image_rows());
    own.turned = c.take<float>(turned_size(s, s.images));
    q = c.take<float>((kTile + kRows) * s.ld);
    turned_q = c.take<float>(s.d * kTexts);
    out = c.take<float>(kTile * s.ld);
    own_out = c.take<float>(kTile * s.ld);
    scores = c.take<float>(kRows * kScores);
    weights = c.take<float>(greatest(kItemRows, s.images) * kTexts);
    text_weights = c.take<float>(kItemRows * kTexts);
    softmax = {c.take<float>(kTexts), c.take<float>(kTexts)};
    own_softmax = {c.take<float>(kTexts), c.take<float>(kTexts)};
  }
  // For n rows; the padding is read, for nothing.
  void clear_softmax(int64_t n) const {
    for (int64_t i = n; i < kTexts; ++i) softmax.top[i] = softmax.factor[i] = 1;
  }
};

// The keys and values of a head of a group.
inline void read_all_keys(const CrossModalAttention& p, const Sizes& s, ForwardTask& t,
                          int64_t group, int64_t head) {
  auto read = [&](const Attended& x, int64_t tokens, int64_t n, Keys& keys) {
    keys.n = n;
    Head(x.k, p.dtype, group, tokens, head, s.d).read_rows(0, n, 1, keys.rows, s.ld);
    Head(x.v, p.dtype, group, tokens, head, s.d).read_rows(0, n, 1, keys.value_rows, s.ld);
    if (keys.turned) turn_all(s, keys.rows, n, keys.turned);
    if (keys.turned_values) turn_all(s, keys.value_rows, n, keys.turned_values);
  };
  if (s.text_keys()) read(p.text, s.texts, s.texts, t.texts);
  read(p.image, s.images, s.image_rows(), t.images);
}

// Calls f(the first item, the number of items) for some of the items at a time.
template <class F>
inline void each_items(const Sizes& s, const F& f) {
  int64_t step = s.items_at_a_time();
  for (int64_t item = 0; item < s.items; item += step) f(item, least(step, s.items - item));
}

// The keys of one item's images, turned into the memory of `own`.
inline void take_item(const Sizes& s, const Keys& images, int64_t item, Keys& own) {
  int64_t offset = item * s.images * s.ld;
  own.n = s.images;
  own.rows = images.rows + offset;
  own.value_rows = images.value_rows + offset;
  turn_all(s, own.rows, own.n, own.turned);
  if (own.turned_values) turn_all(s, own.value_rows, own.n, own.turned_values);
}

// Some columns, from column j on, of rows of texts [n, ld] by their weights and those of the image
// values [images, ld] of an item. `texts` may be null.
template <int vectors, class T>
FASTADAPTERS_INLINE void mix_columns(const Sizes& s, int64_t n, int64_t j, const float* texts,
                                     const float* text_weights, int64_t images, const float* values,
                                     const float* weights, T* out, int64_t stride) {
  const int64_t ld = s.ld, left = s.d - j;
  for (int64_t c = 0; c < n; ++c, ++weights, out += stride) {
    // No hardware prefetcher knows these rows, which are far apart.
    prefetch_columns<1, 3>(out + 8 * stride + j, vectors * kLanes);
    Vec sum[vectors] = {};
    if (texts) {
      Vec weight = broadcast(text_weights[c]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v)
        sum[v] = weight * read<Vec>(texts + c * ld + j + v * kLanes);
    }
    for (int64_t i = 0; i < images; ++i) {
      Vec weight = broadcast(weights[i * kTexts]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v)
        sum[v] = weight * read<Vec>(values + i * ld + j + v * kLanes) + sum[v];
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(out + j + v * kLanes, sum[v], left - v * kLanes);
  }
}

template <class T>
inline void mix(const Sizes& s, int64_t n, const float* texts, const float* text_weights,
                int64_t images, const float* values, const float* weights, T* out, int64_t stride) {
  auto columns = [&](auto vectors, int64_t v) {
    mix_columns<vectors>(s, n, v * kLanes, texts, text_weights, images, values, weights, out,
                         stride);
  };
  int64_t v = 0;
  for (; v + 4 <= s.vectors; v += 4) columns(std::integral_constant<int, 4>(), v);
  for (; v < s.vectors; ++v) columns(std::integral_constant<int, 1>(), v);
}

inline void forward_texts(const CrossModalAttentionForward& p, const Sizes& s, ForwardTask& t,
                          int64_t group, int64_t head, int64_t first) {
  const int64_t n = least(kTile, s.texts - first);
  Head(p.text.q, p.dtype, group, s.texts, head, s.d).read_rows(first, n, s.scale, t.q, s.ld);
  if (s.sees[0][0]) {
    t.clear_softmax(n);
    attend(s, t.texts, n, t.q, t.scores, t.out, t.softmax);
    if (State state{p, s, group, head}) {
      keep_rows(s, n, t.out, state.out + first * s.d);
      state.texts.from(first).copy(t.softmax, n);
    }
  }
  if (s.sees[0][1]) turn(s, t.q, n, t.turned_q, kTexts);
  each_items(s, [&](int64_t item, int64_t items) {
    int64_t row = item * s.images;
    if (!s.blind(0))
      weigh(s, n, t.turned_q, t.softmax, items, t.images.rows + row * s.ld, t.weights,
            t.text_weights);
    for (int64_t i = 0; i < items; ++i) {
      Head out(p.text_out, p.dtype, group + item + i, s.texts, head, s.d);
      if (s.blind(0)) {
        out.clear_rows(first, n);
        continue;
      }
      int64_t images = s.sees[0][1] ? s.images : 0;
      if (images > kChain) {  // as one product
        multiply_long<true, false>(n, s.vectors, images, t.weights + i * images * kTexts, kTexts,
                                   t.images.value_rows + (row + i * images) * s.ld, s.ld, t.own_out,
                                   s.ld);
        for (int64_t c = 0; s.sees[0][0] && c < n; ++c)
          for (int64_t j = c * s.ld; j < c * s.ld + s.vectors * kLanes; j += kLanes)
            store(t.own_out + j,
                  t.text_weights[i * kTexts + c] * read<Vec>(t.out + j) + read<Vec>(t.own_out + j));
        out.write_rows(first, n, 1, t.own_out, s.ld);
        continue;
      }
      with_type(Parameter{out.data, p.dtype}, [&](auto* to) {
        mix(s, n, s.sees[0][0] ? t.out : nullptr, t.text_weights + i * kTexts, images,
            t.images.value_rows + (row + i * images) * s.ld, t.weights + i * images * kTexts,
            to + first * out.token, out.token);
      });
    }
  });
}

// Each query of rows [row, row + n) over the images of its own item.
inline void attend_own(const Sizes& s, ForwardTask& t, int64_t row, int64_t n) {
  if (s.images == 1) {
    for (int64_t i = 0; i < n; i += kLanes) {
      store(t.own_softmax.factor + i, broadcast(1));
      store(t.own_softmax.top + i,
            dots(s, least(kLanes, n - i), t.q + i * s.ld, t.images.rows + (row + i) * s.ld, s.ld));
    }
    std::memcpy(t.own_out, t.images.value_rows + row * s.ld, n * s.ld * sizeof(float));
    return;
  }
  for (int64_t begin = 0, end; begin < n; begin = end) {
    int64_t item = (row + begin) / s.images;
    end = least(n, (item + 1) * s.images - row);
    take_item(s, t.images, item, t.own);
    attend(s, t.own, end - begin, t.q + begin * s.ld, t.scores, t.own_out + begin * s.ld,
           t.own_softmax.from(begin));
  }
}

// What an image query's attention over the texts and over its own images count for, from the
// softmax of each.
struct Shares {
  float texts, own;
};
inline Shares shares(const Sizes& s, const Softmax& texts, const Softmax& own, int64_t i) {
  if (!s.sees[1][0] || !s.sees[1][1]) return {float(s.sees[1][0]), float(s.sees[1][1])};
  float more = own.top[i] - texts.top[i] + s.shift[1];
  float of_own = std::exp(std::fmin(more, 0.0f)) / own.factor[i];
  float of_texts = std::exp(-std::fmax(more, 0.0f)) / texts.factor[i];
  float total = of_own + of_texts;
  return {of_texts / total, of_own / total};
}

// The image queries of some items, `n` rows from `row` of a group's on.
inline void forward_images(const CrossModalAttentionForward& p, const Sizes& s, ForwardTask& t,
                           int64_t group, int64_t head, int64_t row, int64_t n) {
  Head(p.image.q, p.dtype, group, s.images, head, s.d).read_rows(row, n, s.scale, t.q, s.ld);
  Head out(p.image_out, p.dtype, group, s.images, head, s.d);
  if (s.blind(1)) return out.clear_rows(row, n);
  if (s.sees[1][0]) attend(s, t.texts, n, t.q, t.scores, t.out, t.softmax);
  if (s.sees[1][1]) attend_own(s, t, row, n);
  if (State state{p, s, group, head}) {
    int64_t at = s.texts + row;
    if (s.sees[1][0]) {
      keep_rows(s, n, t.out, state.out + at * s.d);
      state.texts.from(at).copy(t.softmax, n);
    }
    if (s.sees[1][1]) {
      keep_rows(s, n, t.own_out, state.own_out + row * s.d);
      state.images.from(row).copy(t.own_softmax, n);
    }
  }
  for (int64_t i = 0; s.sees[1][0] && s.sees[1][1] && i < n; ++i) {
    Shares share = shares(s, t.softmax, t.own_softmax, i);
    for (int64_t j = 0; j < s.vectors * kLanes; j += kLanes)
      store(t.out + i * s.ld + j, read<Vec>(t.out + i * s.ld + j) * share.texts +
                                      read<Vec>(t.own_out + i * s.ld + j) * share.own);
  }
  out.write_rows(row, n, 1, s.sees[1][0] ? t.out : t.own_out, s.ld);
}

// f(row, rows) for each tile of image queries of the items from `item` on.
template <class F>
inline void each_image_tile(const Sizes& s, int64_t tile, const F& f) {
  int64_t item = tile * s.items_of_tile();
  int64_t end = least(item + s.items_of_tile(), s.items) * s.images;
  for (int64_t row = item * s.images; row < end; row += kTile) f(row, least(kTile, end - row));
}

// task(group, head, part, parts) for all tasks.
template <class F>
inline void each_task(const Sizes& s, const Threads& threads, int64_t parts, const F& task) {
  parallel(s.small() ? Threads{} : threads, s.groups * s.heads * parts,
           [&](int64_t i) { task(i / parts / s.heads, i / parts % s.heads, i % parts); });
}

// Whether all texts of an item get its one image's value.
inline bool spreads(const Sizes& s) { return s.sees[0][1] && s.single(0); }

// Writes it, in the order of the memory.
inline void spread_images(const CrossModalAttentionForward& p, const Sizes& s,
                          const Threads& threads) {
  const Heads &v = p.image.v, &out = p.text_out;
  const int64_t size = p.dtype == Dtype::float32 ? 4 : 2, head_bytes = s.d * size;
  const int64_t pieces = out.head == s.d ? 1 : s.heads, bytes = s.heads / pieces * head_bytes;
  parallel(s.small() ? Threads{} : threads, p.items, [&](int64_t item) {
    char* row = task_scratch().reserve(s.heads * head_bytes);
    for (int64_t head = 0; head < s.heads; ++head)
      std::memcpy(row + head * head_bytes, (char*)v.data + (item * v.item + head * v.head) * size,
                  head_bytes);
    for (int64_t c = 0; c < s.texts; ++c)
      for (int64_t i = 0; i < pieces; ++i) {
        char* to = (char*)out.data + (item * out.item + c * out.token + i * out.head) * size;
        std::memcpy(to, row + i * bytes, bytes);
      }
  });
}

void forward(const CrossModalAttentionForward& p, const Threads& threads) {
  Sizes s(p);
  // Not all of it is written below: what nobody reads is the same in every run, too.
  if (p.state) clear(p.state, cross_modal_attention_state(p));
  const bool spread = p.text_out.data && spreads(s);
  if (spread) spread_images(p, s, threads);
  int64_t tiles = p.text_out.data && !spread ? s.text_tiles() : 0, text_tiles = tiles;
  if (p.image_out.data) tiles += s.image_tiles();
  if (tiles == 0) return;
  int64_t parts = s.parts(s.small() ? 1 : threads.count);
  each_task(s, threads, parts, [&](int64_t group, int64_t head, int64_t part) {
    auto t = carve<ForwardTask>(task_scratch(), s);
    read_all_keys(p, s, t, group, head);
    for (int64_t i = tiles * part / parts; i < tiles * (part + 1) / parts; ++i)
      if (i < text_tiles)
        forward_texts(p, s, t, group, head, i * kTile);
      else
        each_image_tile(s, i - text_tiles, [&](int64_t row, int64_t n) {
          forward_images(p, s, t, group, head, row, n);
        });
  });
}

}  // namespace
}  // namespace fastadapters::cpu

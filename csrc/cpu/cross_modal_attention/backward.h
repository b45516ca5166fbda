// Backward: weights are computed again from the log-sum-exps; d_out is read once. A query's
// attention T over the texts and I over images counts for its shares w and 1 - w, so that
//
//     d_T = w d_out      d_I = (1 - w) d_out      d_odds of the texts = w (1 - w) d_out . (T - I)
//
// and each of the two is differentiated for itself. What a text query has with the texts is the
// same for all items, and so are the products with them, of the sums of d_T and of d_odds.
#pragma once

#include "../totals.h"
#include "forward.h"

namespace fastadapters::cpu {
namespace {

// Which gradients are asked for, of text and of image tokens.
struct Wanted {
  bool q[2], k[2], v[2];
  explicit Wanted(const CrossModalAttentionBackward& p)
      : q{p.d_text.q.data != nullptr, p.d_image.q.data != nullptr},
        k{p.d_text.k.data != nullptr, p.d_image.k.data != nullptr},
        v{p.d_text.v.data != nullptr, p.d_image.v.data != nullptr} {}
  bool keys(int modality) const { return k[modality] || v[modality]; }
};

// The gradients of the keys and values of a head of a group, [n, ld] of each: a part's share. Those
// of the texts are sums over all queries, those of an image over the text queries.
struct KeyGradients {
  float *text_k, *text_v, *image_k, *image_v;
  Totals of_text_k, of_text_v, of_image_k, of_image_v;
  KeyGradients(Carver& c, const Sizes& s, const Wanted& w)
      : text_k(c.take<float>(s.texts * s.ld, w.k[0])),
        text_v(c.take<float>(s.texts * s.ld, w.v[0])),
        image_k(c.take<float>(s.image_rows() * s.ld, w.k[1])),
        image_v(c.take<float>(s.image_rows() * s.ld, w.v[1])),
        of_text_k(c, s.texts * s.ld, w.k[0] && s.texts + s.image_rows() > Totals::kRows),
        of_text_v(c, s.texts * s.ld, w.v[0] && s.texts + s.image_rows() > Totals::kRows),
        of_image_k(c, s.image_rows() * s.ld, w.k[1] && s.texts > Totals::kRows),
        of_image_v(c, s.image_rows() * s.ld, w.v[1] && s.texts > Totals::kRows) {}

  void clear(const Sizes& s) const {
    for (float* sum : {text_k, text_v}) cpu::clear(sum, s.texts * s.ld);
    for (float* sum : {image_k, image_v}) cpu::clear(sum, s.image_rows() * s.ld);
    for (const Totals& totals : {of_text_k, of_text_v, of_image_k, of_image_v}) totals.clear();
  }
  void join(bool images) const {
    of_text_k.join(text_k);
    of_text_v.join(text_v);
    if (!images) return;
    of_image_k.join(image_k);
    of_image_v.join(image_v);
  }
  void finish() const {
    of_text_k.finish(text_k);
    of_text_v.finish(text_v);
    of_image_k.finish(image_k);
    of_image_v.finish(image_v);
  }
};

// So many times text queries meet some items before what they sum joins totals.
constexpr int64_t kMeetings = 8;

struct BackwardTask {
  ForwardTask forward;
  KeyGradients sums;
  float *weights, *d_scores;             // [kTile, kScores]
  float *d_out, *dq, *beyond;            // of a tile
  float* d_texts;                        // of a tile, what its attention over the texts gets
  float *some_d_texts, *some_beyond;     // of a tile of texts, over some items
  float *d_rows, *d_weights, *d_values;  // kLanes rows of d_out; of the image keys of some items
  Totals of_dq, of_d_texts, of_beyond;   // of a tile of texts
  BackwardTask(Carver& c, const Sizes& s, const Wanted& w) : forward(c, s), sums(c, s, w) {
    int64_t image_rows = greatest(kItemRows, s.images);
    forward.texts.turned_values = c.take<float>(turned_size(s, s.texts), s.text_keys());
    forward.own.turned_values = c.take<float>(turned_size(s, s.images));
    weights = c.take<float>(kTile * kScores);
    d_scores = c.take<float>(kTile * kScores);
    d_out = c.take<float>((kTile + kRows) * s.ld);
    dq = c.take<float>(kTile * s.ld);
    beyond = c.take<float>(kTexts);
    d_texts = c.take<float>((kTile + kRows) * s.ld);
    some_d_texts = c.take<float>(kTile * s.ld);
    some_beyond = c.take<float>(kTexts);
    d_rows = c.take<float>(kLanes * s.ld);
    d_weights = c.take<float>((image_rows + kRows) * kTexts);
    d_values = c.take<float>(image_rows * s.ld);
    const bool many = s.items > kMeetings * s.items_at_a_time();
    of_dq = Totals(c, kTile * s.ld, many);
    of_d_texts = Totals(c, kTile * s.ld, many);
    of_beyond = Totals(c, kTexts, many);
  }
};

inline void add_to(float* sum, const float* part, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(sum + i, read<Vec>(sum + i) + read<Vec>(part + i));
}

// What one item's d_out gives: adds to the sums over items, and leaves the gradients of its scores
// and of its image values in d_weights and d_values. `text_weights` and `weights` are the item's.
//
// A score's gradient is w_i (g_i - sum_j w_j g_j) where g_j = d_out . v_j. Of what outweighs all
// others, w_i near to 1, that would leave little but roundings: its g is taken off all first.
__attribute__((noinline)) void differentiate_item(const Sizes& s, const Wanted& w, BackwardTask& t,
                                                  const Head& d_out, int64_t first, int64_t n,
                                                  const float* values, const float* text_weights,
                                                  const float* weights, float* d_weights,
                                                  float* d_values) {
  int64_t images = s.sees[0][1] ? s.images : 0, width = s.vectors * kLanes;
  for (int64_t c = 0; c < n; c += kLanes) {
    int64_t rows = least(kLanes, n - c);
    d_out.read_rows(first + c, rows, 1, t.d_rows, s.ld);
    // What is read next is far away: of this item, or of the one behind it.
    d_out.prefetch_rows(c + kLanes < n ? first + c + kLanes : s.texts + first, kLanes);
    Vec by_texts = {}, heaviest = read<Vec>(text_weights + c), of_heaviest = {};
    if (s.sees[0][0] && images) by_texts = dots(s, rows, t.d_rows, t.forward.out + c * s.ld, s.ld);
    for (int64_t i = 0; i < images; ++i) {
      Vec weight = read<Vec>(weights + i * kTexts + c);
      Vec by_weight = dots(s, rows, t.d_rows, values + i * s.ld, 0) - by_texts;
      of_heaviest = weight > heaviest ? by_weight : of_heaviest;
      heaviest = weight > heaviest ? weight : heaviest;
      store(d_weights + i * kTexts + c, by_weight);
    }
    Vec of_texts = -read<Vec>(text_weights + c) * of_heaviest;
    Vec mean = sum_of(of_texts, 0, images, [=](int64_t i) {
      return read<Vec>(weights + i * kTexts + c) *
             (read<Vec>(d_weights + i * kTexts + c) - of_heaviest);
    });
    for (int64_t i = 0; i < images; ++i) {
      float* of_image = d_weights + i * kTexts + c;
      store(of_image,
            read<Vec>(weights + i * kTexts + c) * (read<Vec>(of_image) - of_heaviest - mean));
      for (int64_t j = 0; w.v[1] && j < width; j += kLanes) {
        Vec sum = {};
        for (int64_t r = 0; r < rows; ++r)
          sum += weights[i * kTexts + c + r] * read<Vec>(t.d_rows + r * s.ld + j);
        store(d_values + i * s.ld + j, read<Vec>(d_values + i * s.ld + j) + sum);
      }
    }
    if (!s.sees[0][0]) continue;
    store(t.some_beyond + c,
          read<Vec>(t.some_beyond + c) + read<Vec>(text_weights + c) * (of_heaviest + mean));
    for (int64_t r = 0; r < rows; ++r) {
      Vec weight = broadcast(text_weights[c + r]);
      for (int64_t j = 0; j < width; j += kLanes) {
        float* to = t.some_d_texts + (c + r) * s.ld + j;
        store(to, read<Vec>(to) + weight * read<Vec>(t.d_rows + r * s.ld + j));
      }
    }
  }
}

// Adds to `sum` that of n rows, of whose columns `left` exist.
template <int vectors, class T>
FASTADAPTERS_INLINE void add_rows(const T* rows, int64_t n, int64_t stride, int64_t left,
                                  float* sum) {
  Vec part[vectors] = {};
  for (int64_t i = 0; i < n; ++i, rows += stride)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) part[v] += load(rows + v * kLanes, left - v * kLanes);
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) store(sum + v * kLanes, read<Vec>(sum + v * kLanes) + part[v]);
}

// As `spread_images`: the gradients of an item's image values are the sums over its texts, to
// [H, ld].
inline void gather_images(const CrossModalAttentionBackward& p, const Sizes& s, int64_t item,
                          float* sums) {
  const Heads& d_out = p.d_text_out;
  clear(sums, s.heads * s.ld);
  with_type(Parameter{d_out.data, p.dtype}, [&](auto* rows) {
    for (int64_t first = 0; first < s.texts; first += kTile)
      for (int64_t head = 0; head < s.heads; ++head) {
        const auto* from = rows + item * d_out.item + first * d_out.token + head * d_out.head;
        int64_t n = least(kTile, s.texts - first), v = 0;
        auto add = [&](auto vectors) {
          add_rows<vectors>(from + v * kLanes, n, d_out.token, s.d - v * kLanes,
                            sums + head * s.ld + v * kLanes);
        };
        for (; v + 4 <= s.vectors; v += 4) add(std::integral_constant<int, 4>());
        for (; v < s.vectors; ++v) add(std::integral_constant<int, 1>());
      }
  });
}

inline void backward_texts(const CrossModalAttentionBackward& p, const Sizes& s, const Wanted& w,
                           BackwardTask& t, const KeyGradients& sums, int64_t group, int64_t head,
                           int64_t first) {
  ForwardTask& f = t.forward;
  int64_t n = least(kTile, s.texts - first);
  bool texts = s.sees[0][0], images = s.sees[0][1];
  Head(p.text.q, p.dtype, group, s.texts, head, s.d).read_rows(first, n, s.scale, f.q, s.ld);
  if (texts) {
    State state(p, s, group, head);
    kept_rows(s, n, state.out + first * s.d, f.out);
    f.softmax.copy(state.texts.from(first), n);
    f.clear_softmax(n);
  }
  if (images) turn(s, f.q, n, f.turned_q, kTexts);
  clear(t.dq, n * s.ld);
  clear(t.d_texts, n * s.ld);
  clear(t.beyond, kTexts);
  // f(totals, sums) of what is summed over the items
  auto each_sum = [&](const auto& f) {
    f(t.of_dq, t.dq, n * s.ld);
    f(t.of_d_texts, t.d_texts, n * s.ld);
    f(t.of_beyond, t.beyond, kTexts);
  };
  each_sum([](const Totals& totals, float*, int64_t) { totals.clear(); });
  each_items(s, [&](int64_t item, int64_t items) {
    int64_t row = images ? item * s.images : 0, rows = images ? items * s.images : 0;
    weigh(s, n, f.turned_q, f.softmax, items, f.images.rows + row * s.ld, f.weights,
          f.text_weights);
    clear(t.some_d_texts, n * s.ld);
    clear(t.some_beyond, kTexts);
    clear(t.d_values, rows * s.ld);
    for (int64_t i = 0; i < items; ++i) {
      int64_t begin = images ? i * s.images : 0;
      differentiate_item(s, w, t, Head(p.d_text_out, p.dtype, group + item + i, s.texts, head, s.d),
                         first, n, f.images.value_rows + (row + begin) * s.ld,
                         f.text_weights + i * kTexts, f.weights + begin * kTexts,
                         t.d_weights + begin * kTexts, t.d_values + begin * s.ld);
    }
    add_to(t.d_texts, t.some_d_texts, n * s.ld);
    add_to(t.beyond, t.some_beyond, kTexts);
    if (w.v[1]) add_to(sums.image_v + row * s.ld, t.d_values, rows * s.ld);
    if (w.k[1])
      multiply<false, true>(rows, s.vectors, n, t.d_weights, kTexts, f.q, s.ld,
                            sums.image_k + row * s.ld, s.ld);
    if (w.q[0] && rows)
      multiply_long<true, true>(n, s.vectors, rows, t.d_weights, kTexts, f.images.rows + row * s.ld,
                                s.ld, t.dq, s.ld);
    if (item / s.items_at_a_time() % kMeetings == kMeetings - 1)
      each_sum([](const Totals& totals, float* sums, int64_t n) { totals.join(sums, n); });
  });
  each_sum([](const Totals& totals, float* sums, int64_t n) { totals.finish(sums, n); });
  if (texts)
    differentiate(s, f.texts, {n, f.q, t.d_texts, f.out, f.softmax, t.beyond, s.single(0)},
                  t.weights, t.d_scores, w.q[0] ? t.dq : nullptr, sums.text_k, sums.text_v);
  if (w.q[0])
    Head(p.d_text.q, p.dtype, group, s.texts, head, s.d).write_rows(first, n, s.scale, t.dq, s.ld);
}

// As `attend_own`; t.d_out is what the attention over the own images gets.
inline void differentiate_own(const Sizes& s, BackwardTask& t, const KeyGradients& sums,
                              int64_t row, int64_t n, const Softmax& softmax, float* dq) {
  ForwardTask& f = t.forward;
  if (s.images == 1) {
    const int64_t at = row * s.ld;
    for (int64_t i = 0; i < n; ++i) {
      auto add = [&](float* sum, float factor, const float* x) {
        for (int64_t j = i * s.ld; sum && j < i * s.ld + s.vectors * kLanes; j += kLanes)
          store(sum + j, read<Vec>(sum + j) + factor * read<Vec>(x + j));
      };
      add(dq, -t.beyond[i], f.images.rows + at);
      add(sums.image_k ? sums.image_k + at : nullptr, -t.beyond[i], f.q);
      add(sums.image_v ? sums.image_v + at : nullptr, 1, t.d_out);
    }
    return;
  }
  for (int64_t begin = 0, end; begin < n; begin = end) {
    int64_t item = (row + begin) / s.images, at = begin * s.ld, to = item * s.images * s.ld;
    end = least(n, (item + 1) * s.images - row);
    take_item(s, f.images, item, f.own);
    Queries own{end - begin,         f.q + at,         t.d_out + at, f.own_out + at,
                softmax.from(begin), t.beyond + begin, s.single(1)};
    differentiate(s, f.own, own, t.weights, t.d_scores, dq ? dq + at : nullptr,
                  sums.image_k ? sums.image_k + to : nullptr,
                  sums.image_v ? sums.image_v + to : nullptr);
  }
}

// As `forward_images`.
inline void backward_images(const CrossModalAttentionBackward& p, const Sizes& s, const Wanted& w,
                            BackwardTask& t, const KeyGradients& sums, int64_t group, int64_t head,
                            int64_t row, int64_t n) {
  ForwardTask& f = t.forward;
  State state(p, s, group, head);
  Softmax texts = state.texts.from(s.texts + row), own = state.images.from(row);
  Head(p.image.q, p.dtype, group, s.images, head, s.d).read_rows(row, n, s.scale, f.q, s.ld);
  Head(p.d_image_out, p.dtype, group, s.images, head, s.d).read_rows(row, n, 1, t.d_out, s.ld);
  if (s.sees[1][0]) kept_rows(s, n, state.out + (s.texts + row) * s.d, f.out);
  if (s.sees[1][1]) kept_rows(s, n, state.own_out + row * s.d, f.own_out);
  clear(t.beyond, kTexts);
  for (int64_t i = 0; s.sees[1][0] && s.sees[1][1] && i < n; i += kLanes) {
    const float* d_out = t.d_out + i * s.ld;
    int64_t rows = least(kLanes, n - i);
    store(t.beyond + i, dots(s, rows, d_out, f.own_out + i * s.ld, s.ld) -
                            dots(s, rows, d_out, f.out + i * s.ld, s.ld));
  }
  for (int64_t i = 0; i < n; ++i) {
    Shares share = shares(s, texts, own, i);
    t.beyond[i] *= share.texts * share.own;
    for (int64_t j = i * s.ld; j < i * s.ld + s.vectors * kLanes; j += kLanes) {
      Vec d_out = read<Vec>(t.d_out + j);
      store(t.d_texts + j, d_out * share.texts);
      store(t.d_out + j, d_out * share.own);
    }
  }
  clear(t.dq, n * s.ld);
  float* dq = w.q[1] ? t.dq : nullptr;
  if (s.sees[1][0])
    differentiate(s, f.texts, {n, f.q, t.d_texts, f.out, texts, t.beyond, s.single(1)}, t.weights,
                  t.d_scores, dq, sums.text_k, sums.text_v);
  for (int64_t i = 0; i < n; ++i) t.beyond[i] = -t.beyond[i];
  if (s.sees[1][1]) differentiate_own(s, t, sums, row, n, own, dq);
  if (dq)
    Head(p.d_image.q, p.dtype, group, s.images, head, s.d).write_rows(row, n, s.scale, dq, s.ld);
}

// Writes rows of n tokens, the sum of those of all parts in their order.
inline void write_sum(const Sizes& s, const Head& out, int64_t n, int64_t parts, int64_t stride,
                      float* sum) {
  if (!out.data) return;
  for (int64_t part = 1; part < parts; ++part) add_to(sum, sum + part * stride, n * s.ld);
  out.write_rows(0, n, 1, sum, s.ld);
}

void backward(const CrossModalAttentionBackward& p, const Threads& threads) {
  Sizes s(p);
  Wanted w(p);
  const bool gathers = p.d_text_out.data && w.v[1] && spreads(s);
  const bool texts = p.d_text_out.data && !s.blind(0) && !spreads(s);
  const bool images = p.d_image_out.data && !s.blind(1);
  int64_t text_tiles = s.text_tiles(), tiles = text_tiles + s.image_tiles();
  int64_t parts = s.parts(s.small() ? 1 : threads.count);

  // The sums of several parts, which are added up in the end; a single one has them to itself.
  Carver counter;
  KeyGradients(counter, s, w);
  const size_t size = counter.used;
  const int64_t tasks = s.groups * s.heads * parts, gathered_row = s.heads * s.ld;
  const int64_t gathered_size = gathers ? p.items * gathered_row : 0;
  auto* gathered = (float*)shared_scratch().reserve(size_t(gathered_size) * sizeof(float) +
                                                    size_t(parts > 1 ? tasks : 0) * size);
  char* shared = (char*)(gathered + gathered_size);
  auto sums_of = [&](int64_t group, int64_t head, int64_t part) {
    Carver carver{shared + size_t((group * s.heads + head) * parts + part) * size, 0};
    return KeyGradients(carver, s, w);
  };
  auto finish = [&](int64_t group, int64_t head, const KeyGradients& sums) {
    auto write = [&](const Heads& out, int64_t tokens, int64_t n, float* sum) {
      write_sum(s, Head(out, p.dtype, group, tokens, head, s.d), n, parts,
                int64_t(size / sizeof(float)), sum);
    };
    write(p.d_text.k, s.texts, s.texts, sums.text_k);
    write(p.d_text.v, s.texts, s.texts, sums.text_v);
    write(p.d_image.k, s.images, s.image_rows(), sums.image_k);
    write(p.d_image.v, s.images, s.image_rows(), sums.image_v);
  };

  if (gathers)
    parallel(s.small() ? Threads{} : threads, p.items,
             [&](int64_t item) { gather_images(p, s, item, gathered + item * gathered_row); });
  each_task(s, threads, parts, [&](int64_t group, int64_t head, int64_t part) {
    auto t = carve<BackwardTask>(task_scratch(), s, w);
    KeyGradients sums = parts > 1 ? sums_of(group, head, part) : t.sums;
    sums.clear(s);
    int64_t summed = 0;  // queries, since sums joined totals
    auto sum_next = [&](int64_t queries, bool of_texts) {
      if ((summed += queries) < Totals::kRows) return;
      sums.join(of_texts);
      summed = 0;
    };
    for (int64_t i = 0; gathers && part == 0 && i < s.items; ++i)
      add_to(sums.image_v + i * s.ld, gathered + (group + i) * gathered_row + head * s.ld, s.ld);
    read_all_keys(p, s, t.forward, group, head);
    for (int64_t i = tiles * part / parts; i < tiles * (part + 1) / parts; ++i)
      if (i < text_tiles) {
        int64_t first = i * kTile;
        if (texts)
          backward_texts(p, s, w, t, sums, group, head, first);
        else if (w.q[0])
          Head(p.d_text.q, p.dtype, group, s.texts, head, s.d)
              .clear_rows(first, least(kTile, s.texts - first));
        sum_next(kTile, true);
      } else {
        each_image_tile(s, i - text_tiles, [&](int64_t row, int64_t n) {
          if (images)
            backward_images(p, s, w, t, sums, group, head, row, n);
          else if (w.q[1])
            Head(p.d_image.q, p.dtype, group, s.images, head, s.d).clear_rows(row, n);
          sum_next(n, false);
        });
      }
    sums.finish();
    if (parts == 1) finish(group, head, sums);
  });
  if (parts > 1)
    parallel(threads, s.groups * s.heads, [&](int64_t i) {
      finish(i / s.heads, i % s.heads, sums_of(i / s.heads, i % s.heads, 0));
    });
}

}  // namespace
}  // namespace fastadapters::cpu

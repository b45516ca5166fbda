// The sizes of a call, and its tensors as the kernels want them: fp32 rows of one head.
//
// What shares text keys is a group: all items where they share the texts, else each item. A task
// has one head of a group and some of its tiles, of text queries or of image queries.
#pragma once

#include <cmath>
#include <limits>

#include "../../cross_modal_attention.h"
#include "../activation.h"
#include "../scratch.h"
#include "product.h"

namespace fastadapters::cpu {
namespace {

constexpr int64_t kTile = 48;            // queries of a tile
constexpr int64_t kKeys = 96;            // keys that a tile of queries meets at a time
constexpr int64_t kScores = kKeys + 16;  // of a row of scores: rows apart in the cache
constexpr int64_t kItemRows = 32;        // image keys that a tile of text queries meets at a time
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Sizes {
  int64_t groups, items, texts, images, heads, d;  // items: of a group
  int64_t vectors, ld;                             // of a row of d values, and between two rows
  float scale;
  bool sees[2][2];  // whether text and image queries (rows) see text and image keys
  float shift[2];   // what is added to the scores with images more than to those with texts

  explicit Sizes(const CrossModalAttention& p)
      : groups(p.shared ? 1 : p.items),
        items(p.shared ? p.items : 1),
        texts(p.texts),
        images(p.images),
        heads(p.heads),
        d(p.width),
        vectors(divide_up(d, kLanes)),
        ld(vectors * kLanes % 64 ? vectors * kLanes : vectors * kLanes + 16),
        scale(p.scale) {
    for (int q = 0; q < 2; ++q) {
      for (int k = 0; k < 2; ++k) sees[q][k] = p.bias[q][k] > -kInfinity;
      // Beyond 1e30 it decides alone, and sums of it stay finite.
      double by = double(p.bias[q][1]) - p.bias[q][0];
      shift[q] = sees[q][0] && sees[q][1] ? float(std::fmin(std::fmax(by, -1e30), 1e30)) : 0;
    }
  }
  bool text_keys() const { return sees[0][0] || sees[1][0]; }
  bool blind(int query) const { return !sees[query][0] && !sees[query][1]; }
  // Whether a query sees a single key: its value is the result, whatever the scores.
  bool single(int query) const { return sees[query][0] * texts + sees[query][1] * images == 1; }
  int64_t image_rows() const { return items * images; }
  // Text queries meet as many items at a time as have kItemRows image keys that they see, or one.
  int64_t items_at_a_time() const {
    return sees[0][1] ? greatest(1, kItemRows / images) : kItemRows;
  }
  int64_t text_tiles() const { return divide_up(texts, kTile); }
  // Image queries come in whole items, as many as fit a tile; a larger item is a tile of its own.
  int64_t items_of_tile() const { return greatest(1, kTile / images); }
  int64_t image_tiles() const { return divide_up(items, items_of_tile()); }
  // Into how many tasks a head of a group is split.
  int64_t parts(int threads) const {
    int64_t tasks = greatest(groups * heads, 1);
    return greatest(1, least(divide_up(threads, tasks), text_tiles() + image_tiles()));
  }
  // Below this a second thread costs more than it saves.
  bool small() const {
    int64_t rows = texts + image_rows();
    return groups * heads * d * rows * (texts + images) < 1 << 18;
  }
};

// One head of the tokens of a group: row r is token r % tokens of item r / tokens.
struct Head {
  void* data;
  Dtype dtype;
  int64_t tokens, item, token, d;

  // From item `first` on.
  Head(const Heads& x, Dtype dtype, int64_t first, int64_t tokens, int64_t head, int64_t d)
      : data(nullptr), dtype(dtype), tokens(tokens), item(x.item), token(x.token), d(d) {
    int64_t size = dtype == Dtype::float32 ? 4 : 2;
    if (x.data) data = (char*)x.data + (first * x.item + head * x.head) * size;
  }
  // f(typed pointer to row `row`, number of the row from `first` on)
  template <class F>
  FASTADAPTERS_INLINE void each(int64_t first, int64_t n, const F& f) const {
    with_type(Parameter{data, dtype}, [&](auto* p) {
      for (int64_t i = 0; i < n; ++i) {
        int64_t row = first + i;
        f(p + row / tokens * item + row % tokens * token, i);
      }
    });
  }
  // Rows [first, first + n) times a factor to fp32.
  void read_rows(int64_t first, int64_t n, float factor, float* out, int64_t ld) const {
    each(first, n, [&](const auto* p, int64_t i) {
      for (int64_t j = 0; j < d; j += kLanes) store(out + i * ld + j, load(p + j, d - j) * factor);
    });
  }
  void write_rows(int64_t first, int64_t n, float factor, const float* rows, int64_t ld) const {
    each(first, n, [&](auto* p, int64_t i) {
      for (int64_t j = 0; j < d; j += kLanes)
        store(p + j, read<Vec>(rows + i * ld + j) * factor, d - j);
    });
  }
  void prefetch_rows(int64_t first, int64_t n) const {
    each(first, n, [&](const auto* p, int64_t) { prefetch_columns<0, 3>(p, d); });
  }
  void clear_rows(int64_t first, int64_t n) const {
    each(first, n, [&](auto* p, int64_t) {
      for (int64_t j = 0; j < d; j += kLanes) store(p + j, Vec{}, d - j);
    });
  }
};

// Rows [n, ld] as columns in the lanes: [d, stride], n padded with zeros to whole vectors.
inline void turn(const Sizes& s, const float* rows, int64_t n, float* out, int64_t stride) {
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t j = 0; j < s.d; j += kLanes) {
      Vec block[kLanes];
      for (int64_t r = 0; r < kLanes; ++r)
        block[r] = i + r < n ? read<Vec>(rows + (i + r) * s.ld + j) : Vec{};
      transpose(block);
      for (int64_t r = 0; r < least(kLanes, s.d - j); ++r)
        store(out + (j + r) * stride + i, block[r]);
    }
}

// What `turn` makes of keys or values, kKeys of them at a time: [tiles, d, kKeys].
inline int64_t turned_size(const Sizes& s, int64_t n) { return round_up(n, kKeys) * s.d; }
inline void turn_all(const Sizes& s, const float* rows, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kKeys)
    turn(s, rows + i * s.ld, least(kKeys, n - i), out + i * s.d, kKeys);
}

inline void clear(float* p, int64_t n) {
  if (p) std::memset(p, 0, size_t(n) * sizeof(float));
}

// The softmax of each query: the weight of a key is exp(score - top) * factor.
struct Softmax {
  float *top = nullptr, *factor = nullptr;
  Softmax from(int64_t row) const { return {top + row, factor + row}; }
  void copy(const Softmax& other, int64_t n) const {
    std::memcpy(top, other.top, n * sizeof(float));
    std::memcpy(factor, other.factor, n * sizeof(float));
  }
};

// What a head of a group keeps for the gradients: of its text queries, whose attention over the
// texts alone this is, then of its image queries; behind it what those make of their own images.
struct State {
  float *out = nullptr, *own_out = nullptr;
  Softmax texts, images;
  State(const CrossModalAttention& p, const Sizes& s, int64_t group, int64_t head) {
    if (!p.state) return;
    int64_t own = s.image_rows(), rows = s.texts + own;
    out = p.state + (group * s.heads + head) * (rows * (s.d + 2) + own * (s.d + 2));
    own_out = out + rows * s.d;
    float* constants = own_out + own * s.d;
    texts = {constants, constants + rows};
    images = {constants + 2 * rows, constants + 2 * rows + own};
  }
  explicit operator bool() const { return out; }
};

// n rows [d] of a state, from and to rows [ld].
inline void keep_rows(const Sizes& s, int64_t n, const float* rows, float* kept) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < s.d; j += kLanes)
      store(kept + i * s.d + j, read<Vec>(rows + i * s.ld + j), s.d - j);
}
inline void kept_rows(const Sizes& s, int64_t n, const float* kept, float* rows) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < s.d; j += kLanes)
      store(rows + i * s.ld + j, load(kept + i * s.d + j, s.d - j));
}

}  // namespace
}  // namespace fastadapters::cpu

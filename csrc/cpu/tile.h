// What forward and backward have in common: the work is cut into tiles of rows small enough to
// stay in the second-level cache while they go through every step.
#pragma once

#include <cmath>

#include "../bottleneck.h"
#include "activation.h"
#include "dropout.h"
#include "few.h"
#include "scratch.h"

namespace fastadapters::cpu {
namespace {

constexpr int64_t kTileBytes = 256 << 10;
constexpr int64_t kTileRows = 64;

// Which rows a tile has: `first` and those behind it, of one stride, or those of a list.
struct TileRows {
  int64_t first, count;
  const int64_t* list = nullptr;
  int64_t operator[](int64_t i) const { return list ? list[i] : first + i; }
};

// A tile of rows where the caller has them: in the dtype T of the products, or in fp32.
template <class T>
struct Tile {
  void* data = nullptr;
  int64_t ld = 0, d = 0;
  bool wide = true, listed = false;
  int64_t offsets[kTileRows];  // in elements, of listed rows

  Tile() = default;
  // The row dimensions of `rows` are `shape`.
  Tile(const Rows& rows, Dtype dtype, const int64_t (&shape)[3], const TileRows& which, int64_t d)
      : ld(rows.strides[2]), d(d), wide(dtype == Dtype::float32) {
    if (!rows.data) return;
    auto place = [&](int64_t row) {
      int64_t inner = row % shape[2], middle = row / shape[2] % shape[1];
      int64_t outer = row / shape[2] / shape[1];
      return outer * rows.strides[0] + middle * rows.strides[1] + inner * rows.strides[2];
    };
    listed = which.list;
    data = rows.data;
    if (!listed) data = (char*)data + place(which.first) * (wide ? 4 : int64_t(sizeof(T)));
    for (int64_t i = 0; listed && i < which.count; ++i) offsets[i] = place(which.list[i]);
  }

  // Of row i from `data` on.
  FASTADAPTERS_INLINE int64_t offset(int64_t i) const { return listed ? offsets[i] : i * ld; }

  // f(a typed pointer to the first row)
  template <class F>
  FASTADAPTERS_INLINE auto typed(const F& f) const {
    if constexpr (!std::is_same_v<T, float>)
      if (!wide) return f((T*)data);
    return f((float*)data);
  }
  // n columns of rows that will be read, or written. GCC drops calls of functions that only
  // prefetch.
  FASTADAPTERS_INLINE void expect(int64_t row, int64_t rows, int64_t j, int64_t n) const {
    if (data && !listed) prefetch<0, 2>(row, rows, j, n);
  }
  FASTADAPTERS_INLINE void expect_write(int64_t row, int64_t rows, int64_t j, int64_t n) const {
    if (!listed) prefetch<1, 3>(row, rows, j, n);
  }

 private:
  template <int write, int locality>
  FASTADAPTERS_INLINE void prefetch(int64_t row, int64_t rows, int64_t j, int64_t n) const {
    typed([&](auto* p) FASTADAPTERS_INLINED {
      p += row * ld + j;
      for (int64_t i = 0; i < rows; ++i, p += ld) prefetch_columns<write, locality>(p, n);
    });
  }
};

// Writes row i of a tile from column j on, vector by vector, plus what `add` has there: of the same
// dtype, or absent.
template <class Out>
struct RowWriter {
  Out* to;
  const Out* more;
  int64_t left;  // columns

  template <class T>
  RowWriter(Out* data, const Tile<T>& out, const Tile<T>& add, int64_t i, int64_t j)
      : to(data + out.offset(i) + j),
        more(add.data ? (const Out*)add.data + add.offset(i) + j : nullptr),
        left(out.d - j) {}
  FASTADAPTERS_INLINE void put(int64_t j, Vec v) const {
    if (more) v += load(more + j, left - j);
    store(to + j, v, left - j);
  }
  // As many vectors as a panel has.
  template <int vectors, class F>
  FASTADAPTERS_INLINE void panel(const F& value) const {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) put(j * kLanes, value(j));
  }
};

// A number of columns, as what every layout is made of. "Words" are the 32-bit words of unit.h
// along k.
template <class G>
struct Width {
  int64_t size;
  Panels<G::kPanel> panels;
  int64_t words;   // as k
  int64_t stride;  // of a padded row, in values of G::Store

  static int64_t as_words(int64_t n) {
    return round_up(divide_up(n, G::Unit::kPerWord), G::kDepth);
  }
  explicit Width(int64_t size)
      : size(size),
        panels(size),
        words(as_words(size)),
        stride(round_up(words, kLanes) * G::Unit::kPerWord) {}
  int64_t columns() const { return panels.columns(); }
  int64_t mask_stride() const { return round_up(size, Dropout::kColumns); }
};

template <class G>
struct Sizes {
  int64_t m;
  Width<G> in, out, thin;  // D_in, D_out and r
  bool few;                // rows, which are one tile, and weights that are not packed
  int64_t chain;           // for multiply_long
  int64_t tile_rows;

  explicit Sizes(const Bottleneck& p)
      : m(p.count()),
        in(p.dim),
        out(p.out_dim),
        thin(p.bottleneck),
        few(m <= kFewRows),
        chain(m <= 64 ? 64 : 256) {
    int64_t stride = least(in.stride, out.stride);
    int64_t fitting = kTileBytes / greatest(stride * int64_t(sizeof(typename G::Store)), 1);
    tile_rows = greatest(least(fitting, kTileRows) / G::kBlock, 1) * G::kBlock;
    if (few) tile_rows = round_up(kFewRows, G::kBlock);
  }

  // Contiguous ranges of rows, one per task; a task is worth some tens of microseconds.
  int64_t tasks(int threads, int64_t least_rows) const {
    int64_t worthwhile = m * ((in.size + out.size) / 2) * (thin.size + 8) >> 20;
    return greatest(1, least(least(threads, m / least_rows), worthwhile));
  }

  // tile(rows) for every tile of task t of n. Rows of one stride never cross the innermost row
  // dimension; where that is a few rows they are listed, as many as fit whatever their strides:
  // tiles of four rows would be slow, and the sums over tiles long.
  template <class F>
  void tiles(const Bottleneck& p, int64_t t, int64_t n, const F& tile) const {
    int64_t blocks = divide_up(m, G::kRows);
    int64_t end = least(m, blocks * (t + 1) / n * G::kRows);
    const bool lists = !p.order && (few || p.rows[2] <= kFewRows);
    int64_t listed[kTileRows];
    for (int64_t begin = blocks * t / n * G::kRows; begin < end;) {
      for (int64_t i = 0; lists && i < least(kTileRows, end - begin); ++i) listed[i] = begin + i;
      const int64_t* list = lists ? listed : p.order ? p.order + begin : nullptr;
      int64_t first = list ? *list : begin, within = p.rows[2] - first % p.rows[2];
      int64_t left = list ? end - begin : least(end - begin, within);
      int64_t rows = least(left, round_up(divide_up(left, divide_up(left, tile_rows)), G::kRows));
      bool adjacent = !list || (rows <= within && list[rows - 1] == first + rows - 1);
      tile(TileRows{first, rows, adjacent ? nullptr : list});
      begin += rows;
    }
  }
};

// A tile as the A operand of a GEMM: where it is if its layout allows, else a copy.
template <class G>
struct Operand {
  const typename G::Store* data;
  int64_t ld;
};

// Which elements of a tile dropout keeps, times `value`. Without `kept` there is no dropout.
struct TileMask {
  const int8_t* kept = nullptr;
  int64_t stride = 0;
  float value = 1;
  Vec operator()(int64_t i, int64_t j) const { return where_kept(kept + i * stride + j, value); }
};

// The mask of a tile of rows, filled into `kept`.
template <class G>
inline TileMask tile_mask(const Dropout& dropout, const TileRows& rows, const Width<G>& width,
                          int8_t* kept, float value) {
  if (!dropout.on) return {};
  for (int64_t i = 0; i < rows.count; ++i)
    dropout.row(rows[i], width.size, kept + i * width.mask_stride());
  return {kept, width.mask_stride(), value};
}

// How to normalise it on the way: mean and reciprocal standard deviation of each row, then gain and
// shift of each column if given.
struct Normalise {
  const float *stats = nullptr, *weight = nullptr, *bias = nullptr;
};

template <class G, class T, class X>
inline Operand<G> operand(const X* x, const Tile<T>& tile, int64_t m, const Width<G>& width,
                          typename G::Store* copy, Normalise norm = {}, TileMask mask = {}) {
  if constexpr (std::is_same_v<X, typename G::Store>)
    if (!tile.listed && !norm.stats && !mask.kept && m % G::kRows == 0 &&
        width.words * G::Unit::kPerWord == width.size)
      return {x, tile.ld};
  for (int64_t i = 0; i < round_up(m, G::kRows); ++i) {
    auto* to = copy + i * width.stride;
    int64_t j = 0;
    auto each = [&](const auto& value) FASTADAPTERS_INLINED {
      const X* from = x + tile.offset(i);
      for (; j + kLanes <= width.size; j += kLanes) store(to + j, value(load(from + j), j));
      if (j == width.size) return;
      store(to + j, value(load(from + j, width.size - j), j));
      j += kLanes;
    };
    if (i < m && !norm.stats && !mask.kept)
      each([](Vec v, int64_t) { return v; });
    else if (i < m)
      each([&](Vec v, int64_t j) {
        if (norm.stats) v = (v - norm.stats[2 * i]) * norm.stats[2 * i + 1];
        if (norm.weight) v = v * read<Vec>(norm.weight + j) + read<Vec>(norm.bias + j);
        return mask.kept ? v * mask(i, j) : v;
      });
    for (; j < width.stride; j += kLanes) store(to + j, Vec{});
  }
  return {copy, width.stride};
}

// The sum of f(j) over the vectors of d columns, as four chains of additions.
template <class F>
FASTADAPTERS_INLINE Vec sum_columns(int64_t d, const F& f) {
  Vec part[4] = {};
  int64_t j = 0;
  for (; j + 4 * kLanes <= d; j += 4 * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) part[i] += f(j + i * kLanes);
  for (; j < d; j += kLanes) part[0] += f(j);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// Mean and reciprocal standard deviation of a row. What rounding left out of the mean is found and
// added: the mean of a constant row is its value.
template <class T>
inline void row_statistics(const T* x, int64_t d, float eps, float* stats) {
  auto value = [&](int64_t j) { return load(x + j, d - j); };
  float rough = sum(sum_columns(d, value)) / d;
  auto centred = [&](int64_t j) { return first_lanes(value(j) - rough, d - j); };
  float mean = rough + sum(sum_columns(d, centred)) / d;
  auto square = [&](int64_t j) {
    Vec v = first_lanes(value(j) - mean, d - j);
    return v * v;
  };
  stats[0] = mean;
  stats[1] = 1 / std::sqrt(sum(sum_columns(d, square)) / d + eps);
}

// A parameter [n] as fp32 rounded to T, padded to whole vectors; `absent` where it is not given.
template <class T>
inline void expand(const Parameter& p, int64_t n, float absent, float* out) {
  Weight<T> row{p, 1, n};
  for (int64_t j = 0; j < n; j += kLanes) store(out + j, p.data ? row(0, j) : broadcast(absent));
}

}  // namespace
}  // namespace fastadapters::cpu

// Backward of the pairs where what the adapter makes of a text depends on one of the two at most.
#pragma once

#include "needs.h"
#include "separate.h"

namespace fastadapters::cpu {
namespace {

struct SeparateBackwardArrays {
  int64_t tasks;
  float *square, *own;    // gradients [rows], padded to whole vectors
  float* item_chains;     // [tasks, 2, ld]: those of some texts of a task, by item
  double* item_sums;      // [tasks, 2, ld]: of all of them
  double *scale, *share;  // [tasks]
  float *e, *z;           // gradients [rows, R + 1], [rows, R]
  float* weighted;        // [rows, R + 1]

  SeparateBackwardArrays(Carver& c, const Head& h, const Separate& p, const Threads& threads)
      : tasks(threads.count) {
    bool wanted = Separate::wanted(h);
    square = c.take<float>(round_up(p.rows, kLanes), wanted);
    own = c.take<float>(round_up(p.rows, kLanes), wanted);
    item_chains = c.take<float>(tasks * 2 * p.ld, wanted);
    item_sums = c.take<double>(tasks * 2 * p.ld, wanted);
    scale = c.take<double>(tasks, wanted);
    share = c.take<double>(tasks, wanted);
    e = c.take<float>(p.rows * h.columns, wanted);
    z = c.take<float>(p.rows * h.inner, wanted);
    weighted = c.take<float>(p.rows * h.columns, wanted);
  }
};

// a.square, a.own, and in place of their values p.cross; from the gradients of the logits in g.dots
// those of the dots.
inline void separate_pairs_backward(const Head& h, const Separate& p, const MultimodalState& s,
                                    const Threads& threads, const SeparateBackwardArrays& a,
                                    PairGradients& g) {
  constexpr int64_t texts = 32, items = 32 * kLanes;  // of a chain
  parallel(threads, a.tasks, [&](int64_t task) {
    float* chains = a.item_chains + task * 2 * p.ld;
    double* sums = a.item_sums + task * 2 * p.ld;
    std::memset(chains, 0, 2 * p.ld * sizeof(float));
    std::memset(sums, 0, 2 * p.ld * sizeof(double));
    a.scale[task] = a.share[task] = 0;
    int64_t begin = h.texts * task / a.tasks, end = h.texts * (task + 1) / a.tasks;
    for (int64_t text = begin; text < end; ++text) {
      double text_square = 0, by_square = 0, own = 0;
      for (int64_t first = 0; first < h.items; first += items) {
        Vec part[5] = {};
        for (int64_t item = first; item < least(first + items, h.items); item += kLanes) {
          float* gradient = g.dots + text * g.ld + item;
          auto d = cosine_backward(h, p.products(h, s, text, item), read<Vec>(gradient));
          Vec by_own = p.by_text ? d.by.text_dot : d.by.image_dot;
          store(gradient, d.by.dot);
          store(p.cross + text * p.ld + item, p.by_text ? d.by.image_dot : d.by.text_dot);
          part[0] += d.by.text_square;
          part[1] += d.scale;
          part[2] += d.share;
          if (p.by_text) {
            part[3] += d.by.square;
            part[4] += by_own;
          } else {
            store(chains + item, read<Vec>(chains + item) + d.by.square);
            store(chains + p.ld + item, read<Vec>(chains + p.ld + item) + by_own);
          }
        }
        text_square += sum(part[0]);
        a.scale[task] += sum(part[1]);
        a.share[task] += sum(part[2]);
        by_square += sum(part[3]);
        own += sum(part[4]);
      }
      g.text_square[text] = float(text_square);
      if (p.by_text) {
        a.square[text] = float(by_square);
        a.own[text] = float(own);
      } else if ((text - begin) % texts == texts - 1 || text == end - 1) {
        for (int64_t i = 0; i < 2 * p.ld; ++i) sums[i] += chains[i];
        std::memset(chains, 0, 2 * p.ld * sizeof(float));
      }
    }
  });
  g.scale = g.share = 0;
  for (int64_t task = 0; task < a.tasks; ++task) {
    g.scale += a.scale[task];
    g.share += a.share[task];
    for (int64_t i = 0; !p.by_text && i < h.items; ++i) {
      const double* sums = a.item_sums + task * 2 * p.ld + i;
      a.square[i] = float(sums[0] + (task ? a.square[i] : 0));
      a.own[i] = float(sums[p.ld] + (task ? a.own[i] : 0));
    }
  }
}

// All of g and a.z.
inline void separate_backward(const Head& h, const Separate& p, const MultimodalState& s,
                              const Threads& threads, const SeparateBackwardArrays& a,
                              PairGradients& g) {
  separate_pairs_backward(h, p, s, threads, a, g);
  int64_t n = h.columns;
  View cross = p.by_text ? rows_of(p.cross, p.ld) : columns_of(p.cross, p.ld);
  const float* other_dots = p.by_text ? p.image_dots : s.text_dots;
  float* d_own_dots = p.by_text ? g.text_dots : g.image_dots;
  float* d_other_dots = p.by_text ? g.image_dots : g.text_dots;
  int64_t others = p.by_text ? h.items : h.texts;

  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < n; ++j) p.form[i * n + j] *= 2 * a.square[i];
  multiply(threads, p.rows, n, n, rows_of(p.form, n), rows_of(s.form, n), a.e, n);
  multiply(threads, p.rows, n, others, cross, rows_of(other_dots, n), a.e, n, true);
  const float* own_dots = p.own_dots(s);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < n; ++j) {
      a.e[i * n + j] += a.own[i] * own_dots[i * n + j];
      d_own_dots[i * g.padded + j] = a.own[i] * p.e[i * n + j];
      a.weighted[i * n + j] = 2 * a.square[i] * p.e[i * n + j];
    }
  multiply(threads, others, n, p.rows, cross.transposed(), rows_of(p.e, n), d_other_dots, g.padded);
  multiply(threads, n, n, p.rows, columns_of(a.weighted, n), rows_of(p.e, n), g.form, g.padded);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < h.inner; ++j) a.z[i * h.inner + j] = a.e[i * n + j];
  through_activation(h, p.rows, p.z, a.z);
}

}  // namespace
}  // namespace fastadapters::cpu

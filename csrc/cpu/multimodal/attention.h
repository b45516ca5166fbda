// Attention of many queries over the texts, head by head, flash-style: no [queries, C] in memory
// beyond a strip of queries, and in backward beyond a block of keys too.
#pragma once

#include "../totals.h"
#include "head.h"

namespace fastadapters::cpu {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr int64_t kForwardStrip = 24, kBackwardStrip = 24, kKeyPanels = 3;
constexpr int64_t kKeyBlock = kKeyPanels * kPanelColumns;

// Keys and values of all heads, packed, `values` for each kPart of them.
struct PackedTexts {
  int64_t texts, head;
  int64_t transposed_size, rows_size;
  float *keys_transposed, *values_transposed, *keys, *values;

  PackedTexts(Carver& c, const Head& h, bool backward, bool wanted = true)
      : texts(h.texts),
        head(h.head),
        transposed_size(packed_size(h.head, h.texts)),
        rows_size(packed_size(h.texts, h.head)),
        keys_transposed(c.take<float>(h.heads * transposed_size, wanted)),
        values_transposed(c.take<float>(h.heads * transposed_size, wanted && backward)),
        keys(c.take<float>(h.heads * rows_size, wanted && backward)),
        values(c.take<float>(h.heads * rows_size, wanted && !backward)) {}

  float* values_from(int64_t i, int64_t text) const {
    return values + i * rows_size + packed_size(text, head);
  }

  void fill(const Head& h, const Threads& threads, const float* qkv) const {
    parallel(threads, h.heads, [&](int64_t i) {
      View k = rows_of(qkv + h.width + i * head, 3 * h.width), v = k.from(0, h.width);
      pack(k.transposed(), head, texts, keys_transposed + i * transposed_size);
      if (values_transposed)
        pack(v.transposed(), head, texts, values_transposed + i * transposed_size);
      if (keys) pack(k, texts, head, keys + i * rows_size);
      for (int64_t text = 0; values && text < texts; text += kPart)
        pack(v.from(text, 0), least(kPart, texts - text), head, values_from(i, text));
    });
  }
};

// n scores of a row, in whole vectors, become its softmax's numerators; returns their sum and the
// log-sum-exp.
inline float exponentiate(int64_t n, float scale, float* scores, float* lse) {
  for (int64_t j = n; j < round_up(n, kLanes); ++j) scores[j] = scores[n - 1];
  Vec top[4];
  for (Vec& v : top) v = read<Vec>(scores);
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) top[i] = larger(read<Vec>(scores + j + i * kLanes), top[i]);
  for (; j < n; j += kLanes) top[0] = larger(read<Vec>(scores + j), top[0]);
  const float highest = largest(larger(larger(top[0], top[1]), larger(top[2], top[3])));

  Vec part[4] = {};
  const float factor = scale * kLog2E, lowest = -126 / factor;
  auto power = [&](int64_t at, Vec v) {
    v = power_of_two(larger(broadcast(lowest), v - highest), factor);
    store(scores + at, v);
    return v;
  };
  for (j = 0; j + 4 * kLanes <= n; j += 4 * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      part[i] += power(j + i * kLanes, read<Vec>(scores + j + i * kLanes));
  for (; j < n; j += kLanes) part[0] += first_lanes(power(j, read<Vec>(scores + j)), n - j);
  float total = sum((part[0] + part[1]) + (part[2] + part[3]));
  *lse = highest * scale + std::log(total);
  return total;
}

// attended, lse of the rows that attend.
inline void attend(const Head& h, const PackedTexts& packed, const Threads& threads,
                   const MultimodalState& s) {
  int64_t queries = h.last_query - h.first_query;
  int64_t strips = divide_up(queries, kForwardStrip), ld = round_up(h.texts, kPanelColumns);
  int64_t d = h.head;
  struct Task {
    float *scores, *out, *part;
    Task(Carver& c, int64_t ld, int64_t d)
        : scores(c.take<float>(kForwardStrip * ld)),
          out(c.take<float>(kForwardStrip * d)),
          part(c.take<float>(kForwardStrip * d)) {}
  };
  int64_t tasks = least(threads.count, h.heads * strips);
  parallel(threads, tasks, [&](int64_t t) {
    auto task = carve<Task>(task_scratch(), ld, d);
    for (int64_t at = h.heads * strips * t / tasks; at < h.heads * strips * (t + 1) / tasks; ++at) {
      int64_t i = at / strips, row = h.first_query + at % strips * kForwardStrip;
      int64_t n = least(kForwardStrip, h.last_query - row);
      multiply_packed(n, round_up(h.texts, kLanes), d,
                      rows_of(s.qkv + row * 3 * h.width + i * d, 3 * h.width),
                      packed.keys_transposed + i * packed.transposed_size, task.scores, ld, false);
      float total[kForwardStrip];
      for (int64_t q = 0; q < n; ++q)
        total[q] =
            exponentiate(h.texts, h.scale, task.scores + q * ld, s.lse + (row + q) * h.heads + i);
      for (int64_t text = 0; text < h.texts; text += kPart) {
        multiply_packed(n, d, least(kPart, h.texts - text), rows_of(task.scores + text, ld),
                        packed.values_from(i, text), text ? task.part : task.out, d, false);
        for (int64_t j = 0; text && j < n * d; ++j) task.out[j] += task.part[j];
      }
      for (int64_t q = 0; q < n; ++q) {
        float* to = s.attended + (row + q) * h.width + i * d;
        for (int64_t j = 0; j < d; j += kLanes)
          store(to + j, load(task.out + q * d + j, d - j) / total[q], d - j);
      }
    }
  });
}

// Gradients by keys and values, [heads, groups, C, d]: each head's strips of queries are split into
// groups, which sum for themselves.
struct AttentionGradients {
  int64_t strips, groups, size;
  float *dk, *dv;

  AttentionGradients(Carver& c, const Head& h, const Threads& threads, bool wanted)
      : strips(divide_up(h.last_query - h.first_query, kBackwardStrip)),
        groups(greatest(1, least(strips, threads.count / h.heads))),
        size(h.texts * h.head),
        dk(c.take<float>(h.heads * groups * size, wanted)),
        dv(c.take<float>(h.heads * groups * size, wanted)) {}
};

constexpr int64_t kJoinedStrips = Totals::kRows / kBackwardStrip;
constexpr int64_t kJoinedPanels = Totals::kRows / kKeyBlock * kKeyPanels;

// From d_out [N, E] and d_lse [N, H] of the rows that attend: adds to d_qkv [N, 3 E].
inline void attend_backward(const Head& h, const PackedTexts& packed, const AttentionGradients& g,
                            const Threads& threads, const MultimodalState& s, const float* d_out,
                            const float* d_lse, float* d_qkv) {
  const int64_t d = h.head, ld = 3 * h.width, groups = g.groups, size = g.size;
  std::memset(g.dk, 0, h.heads * groups * size * sizeof(float));
  std::memset(g.dv, 0, h.heads * groups * size * sizeof(float));
  struct Task {
    float *weights, *d_scores, *q, *d_out, *dq;
    Totals dk, dv;
    Task(Carver& c, const AttentionGradients& g, int64_t d)
        : weights(c.take<float>(kBackwardStrip * kKeyBlock)),
          d_scores(c.take<float>(kBackwardStrip * kKeyBlock)),
          q(c.take<float>(packed_size(kBackwardStrip, d))),
          d_out(c.take<float>(packed_size(kBackwardStrip, d))),
          dq(c.take<float>(kBackwardStrip * d)),
          dk(c, g.size, g.strips > kJoinedStrips),
          dv(c, g.size, g.strips > kJoinedStrips) {}
  };
  Panels<kPanelVectors> panels(h.texts);

  parallel(threads, h.heads * groups, [&](int64_t t) {
    auto task = carve<Task>(task_scratch(), g, d);
    task.dk.clear();
    task.dv.clear();
    float *dk = g.dk + t * size, *dv = g.dv + t * size;
    int64_t i = t / groups, group = t % groups;
    const float* kt = packed.keys_transposed + i * packed.transposed_size;
    const float* vt = packed.values_transposed + i * packed.transposed_size;
    Panels<kPanelVectors> thin(d);
    for (int64_t strip = g.strips * group / groups; strip < g.strips * (group + 1) / groups;
         ++strip) {
      int64_t row = h.first_query + strip * kBackwardStrip;
      int64_t n = least(kBackwardStrip, h.last_query - row);
      View q = rows_of(s.qkv + row * ld + i * d, ld);
      View d_o = rows_of(d_out + row * h.width + i * d, h.width);
      pack(q, n, d, task.q);
      pack(d_o, n, d, task.d_out);
      float delta[kBackwardStrip], lse[kBackwardStrip];
      for (int64_t r = 0; r < n; ++r) {
        int64_t at = (row + r) * h.heads + i;
        delta[r] =
            dot(d_o.data + r * d_o.row, s.attended + (row + r) * h.width + i * d, d) - d_lse[at];
        lse[r] = s.lse[at];
      }
      for (int64_t p = 0; p < panels.count; p += kKeyPanels) {
        int64_t end = least(p + kKeyPanels, panels.count);
        int64_t first = panels.first(p) * kLanes, stored = panels.first(end) * kLanes - first;
        int64_t keys = least(stored, h.texts - first);
        for (int64_t j = p; j < end; ++j) {
          int64_t column = panels.first(j) * kLanes, width = panels.size(j) * kLanes;
          multiply_panel(panels.size(j), n, width, d, q, kt + d * column, width,
                         task.weights + column - first, kKeyBlock, false);
          multiply_panel(panels.size(j), n, width, d, d_o, vt + d * column, width,
                         task.d_scores + column - first, kKeyBlock, false);
        }
        for (int64_t r = 0; r < n; ++r)
          for (int64_t j = 0; j < stored; j += kLanes) {
            float *w = task.weights + r * kKeyBlock + j, *ds = task.d_scores + r * kKeyBlock + j;
            Vec y = read<Vec>(w) * h.scale - lse[r];
            y = larger(broadcast(-87), smaller(broadcast(1), y));
            Vec weight = power_of_two(y, kLog2E);
            store(w, weight);
            store(ds, weight * (read<Vec>(ds) - delta[r]) * h.scale);
          }
        for (int64_t j = 0; j < thin.count; ++j) {
          int64_t column = thin.first(j) * kLanes, width = thin.size(j) * kLanes;
          multiply_panel(thin.size(j), n, d - column, keys, rows_of(task.d_scores, kKeyBlock),
                         packed.keys + i * packed.rows_size + h.texts * column + first * width,
                         width, task.dq + column, d, p % kJoinedPanels > 0);
          multiply_panel(thin.size(j), keys, d - column, n, columns_of(task.d_scores, kKeyBlock),
                         task.q + n * column, width, dk + first * d + column, d, true);
          multiply_panel(thin.size(j), keys, d - column, n, columns_of(task.weights, kKeyBlock),
                         task.d_out + n * column, width, dv + first * d + column, d, true);
        }
        if (end % kJoinedPanels && end < panels.count) continue;
        for (int64_t r = 0; r < n; ++r) {
          float* to = d_qkv + (row + r) * ld + i * d;
          for (int64_t j = 0; j < d; j += kLanes)
            store(to + j, load(to + j, d - j) + load(task.dq + r * d + j, d - j), d - j);
        }
      }
      if (strip % kJoinedStrips == 0) {
        task.dk.join(dk);
        task.dv.join(dv);
      }
    }
    task.dk.finish(dk);
    task.dv.finish(dv);
  });

  parallel(threads, h.heads, [&](int64_t i) {
    for (int64_t text = 0; text < h.texts; ++text)
      for (int part = 1; part < 3; ++part) {
        float* to = d_qkv + text * ld + part * h.width + i * d;
        const float* from = (part == 1 ? g.dk : g.dv) + i * groups * size + text * d;
        for (int64_t j = 0; j < d; j += kLanes) {
          Vec total = load(to + j, d - j);
          for (int64_t group = 0; group < groups; ++group)
            total += load(from + group * size + j, d - j);
          store(to + j, total, d - j);
        }
      }
  });
}

}  // namespace
}  // namespace fastadapters::cpu

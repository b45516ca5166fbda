// The CPU kernels of cross-modal attention on raw pointers, every instruction set, with no Python
// and no PyTorch around them, so that sanitizers see all there is. Results are compared with naive
// loops in double precision under the rule of tests/compare.py. Prints one line per failure; exits
// 1 if there was any.
#include <array>
#include <cstdio>
#include <random>

#include "arrays.h"
#include "cpu/cross_modal_attention/cross_modal_attention.h"
#include "cpu/isa.h"

namespace fastadapters {
namespace {

constexpr double kBlocked = -std::numeric_limits<double>::infinity();

struct Case {
  int64_t texts, images, items, heads, width;
  bool shared;
  double bias[2][2];
  int64_t gap = 0;  // between rows, in elements
};

const Case kCases[] = {
    {37, 1, 5, 2, 32, true, {{0, 1}, {1, 0}}},
    {37, 1, 40, 2, 8, true, {{kBlocked, 0}, {0, kBlocked}}, 3},
    {7, 3, 9, 2, 33, true, {{0.3, -1}, {kBlocked, 2}}, 1},
    {110, 2, 3, 1, 20, false, {{0, 1}, {1, 0}}},
    {5, 60, 2, 1, 40, false, {{0, kBlocked}, {0, 0.5}}, 2},
    {1, 1, 30, 1, 128, true, {{0, 0}, {0, kBlocked}}},
    {50, 1, 0, 2, 16, true, {{0, 1}, {1, 0}}},
    {9, 2, 6, 2, 12, false, {{kBlocked, kBlocked}, {0, 0}}},
};

constexpr int kBases = 3, kInputs = 6, kOutputs = 8;
constexpr const char* kNames[kOutputs] = {"text_out", "image_out", "d_text_q",  "d_text_k",
                                          "d_text_v", "d_image_q", "d_image_k", "d_image_v"};
using Inputs = std::array<Values, kInputs + 2>;  // q, k, v of texts and images; d_out of both

// Every result, each number through `round`, as PyTorch's operators in that format would.
template <class Round>
std::vector<Values> naive(const Case& c, const Inputs& in, double scale, const Round& round) {
  const int64_t h = c.heads, d = c.width, tokens[2] = {c.texts, c.images};
  std::vector<Values> out;
  for (int i : {0, 1}) out.emplace_back(size_t(c.items * tokens[i] * h * d), 0.0);
  for (int i = 0; i < kInputs; ++i) out.emplace_back(in[size_t(i)].size(), 0.0);
  auto at = [&](int modality, bool result, int64_t item, int64_t token, int64_t head) {
    if (modality == 0 && c.shared && !result) item = 0;
    return size_t(((item * tokens[modality] + token) * h + head) * d);
  };
  const int64_t n = c.texts + c.images;
  for (int64_t b = 0; b < c.items; ++b)
    for (int64_t head = 0; head < h; ++head)
      for (int64_t q = 0; q < n; ++q) {
        const int mq = q >= c.texts;
        const int64_t tq = mq ? q - c.texts : q;
        const size_t query = at(mq, false, b, tq, head), result = at(mq, true, b, tq, head);
        const double* qv = &in[size_t(3 * mq)][query];
        const double* dv = &in[size_t(6 + mq)][result];
        Values p(static_cast<size_t>(n), 0.0), dp(static_cast<size_t>(n), 0.0);
        double top = kBlocked, total = 0, delta = 0;
        auto offset = [&](int64_t k) {
          return k < c.texts ? at(0, false, b, k, head) : at(1, false, b, k - c.texts, head);
        };
        for (int64_t k = 0; k < n; ++k) {
          const double* kv = &in[size_t(3 * (k >= c.texts) + 1)][offset(k)];
          double s = 0;
          for (int64_t j = 0; j < d; ++j) s = round(s + qv[j] * kv[j]);
          p[size_t(k)] = round(s * scale + c.bias[mq][k >= c.texts]);
          top = std::max(top, p[size_t(k)]);
        }
        if (top == kBlocked) continue;
        for (double& v : p) total += v = round(std::exp(v - top));
        for (double& v : p) v = round(v / total);
        for (int64_t k = 0; k < n; ++k) {
          const int mk = k >= c.texts;
          for (int64_t j = 0; j < d; ++j) {
            double& o = out[size_t(mq)][result + size_t(j)];
            o = round(o + p[size_t(k)] * in[size_t(3 * mk + 2)][offset(k) + size_t(j)]);
            double& g = out[size_t(2 + 3 * mk + 2)][offset(k) + size_t(j)];
            g = round(g + p[size_t(k)] * dv[j]);
            dp[size_t(k)] =
                round(dp[size_t(k)] + dv[j] * in[size_t(3 * mk + 2)][offset(k) + size_t(j)]);
          }
          delta = round(delta + p[size_t(k)] * dp[size_t(k)]);
        }
        for (int64_t k = 0; k < n; ++k) {
          const int mk = k >= c.texts;
          const double ds = round(p[size_t(k)] * (dp[size_t(k)] - delta));
          for (int64_t j = 0; j < d; ++j) {
            double& dq = out[size_t(2 + 3 * mq)][query + size_t(j)];
            dq = round(dq + ds * scale * in[size_t(3 * mk + 1)][offset(k) + size_t(j)]);
            double& dk = out[size_t(2 + 3 * mk + 1)][offset(k) + size_t(j)];
            dk = round(dk + ds * scale * qv[j]);
          }
        }
      }
  return out;
}

// One forward and one backward pass of the kernels in use; outputs not in `wanted` stay NaN.
std::vector<Values> run(const Case& c, const Inputs& in, double scale, Dtype dtype,
                        const cpu::Threads& threads, unsigned wanted) {
  const int64_t shared = c.shared ? 1 : c.items;
  const int64_t text[3] = {shared, c.texts, c.heads}, image[3] = {c.items, c.images, c.heads};
  const int64_t text_out[3] = {c.items, c.texts, c.heads};
  auto array = [&](const int64_t (&shape)[3], const Values* values, int64_t gap) {
    Array a(dtype, shape, c.width, gap);
    if (values) a.fill(*values);
    return a;
  };
  auto heads = [&](Array& a, bool one) {
    return Heads{a.memory.data(), one ? 0 : a.strides[0], a.strides[1], a.strides[2]};
  };
  std::vector<Array> inputs, gradients;
  for (int i = 0; i < kInputs; ++i) {
    inputs.push_back(array(i < 3 ? text : image, &in[size_t(i)], c.gap));
    gradients.push_back(array(i < 3 ? text : image, nullptr, 0));
  }
  Array outs[2] = {array(text_out, nullptr, 0), array(image, nullptr, 0)};
  Array d_outs[2] = {array(text_out, &in[6], c.gap), array(image, &in[7], c.gap)};

  CrossModalAttention p;
  p.dtype = dtype;
  p.items = c.items;
  p.texts = c.texts;
  p.images = c.images;
  p.heads = c.heads;
  p.width = c.width;
  p.shared = c.shared;
  auto all = [&](std::vector<Array>& a, int first, bool one) {
    return Attended{heads(a[size_t(first)], one), heads(a[size_t(first + 1)], one),
                    heads(a[size_t(first + 2)], one)};
  };
  p.text = all(inputs, 0, c.shared);
  p.image = all(inputs, 3, false);
  p.scale = float(scale);
  for (int i = 0; i < 4; ++i) p.bias[i / 2][i % 2] = float(c.bias[i / 2][i % 2]);
  std::vector<float> state(size_t(cpu::cross_modal_attention_state(p)), float(kNaN));
  p.state = state.data();

  CrossModalAttentionForward forward{p, {}, {}};
  if (wanted & 1) forward.text_out = heads(outs[0], false);
  if (wanted & 2) forward.image_out = heads(outs[1], false);
  cpu::cross_modal_attention_forward(forward, threads);

  CrossModalAttentionBackward backward{};
  static_cast<CrossModalAttention&>(backward) = p;
  if (wanted & 1) backward.d_text_out = heads(d_outs[0], false);
  if (wanted & 2) backward.d_image_out = heads(d_outs[1], false);
  Heads* slots[] = {&backward.d_text.q,  &backward.d_text.k,  &backward.d_text.v,
                    &backward.d_image.q, &backward.d_image.k, &backward.d_image.v};
  for (int i = 0; i < kInputs; ++i)
    if (wanted >> (i + 2) & 1) *slots[i] = heads(gradients[size_t(i)], c.shared && i < 3);
  cpu::cross_modal_attention_backward(backward, threads);

  std::vector<Values> results = {outs[0].read(), outs[1].read()};
  for (Array& gradient : gradients) results.push_back(gradient.read());
  return results;
}

int check(const Case& c, int index, Dtype dtype, const std::vector<std::string>& isas) {
  const Format& form = format(dtype);
  const double eps = std::ldexp(1.0, 1 - form.bits), scale = 1 / std::sqrt(double(c.width));
  std::mt19937_64 generator(static_cast<uint64_t>(index));
  const int64_t row = c.heads * c.width, text = (c.shared ? 1 : c.items) * c.texts * row;
  const int64_t image = c.items * c.images * row, sizes[] = {text, image};
  Inputs in;
  for (int i = 0; i < kInputs + 2; ++i) {
    std::normal_distribution<double> distribution;
    in[size_t(i)].resize(size_t(i == 6 ? c.items * c.texts * row : sizes[i == 7 || i / 3 == 1]));
    for (double& v : in[size_t(i)]) v = nearest(distribution(generator), form);
  }
  auto gold = naive(c, in, scale, [](double v) { return v; });
  std::vector<std::vector<Values>> bases;
  for (int i = 0; i < kBases; ++i) {
    Inputs moved = in;
    for (Values& values : moved)
      for (double& v : values) v = nearest(v * (1 + eps * (int(generator() % 3) - 1)), form);
    bases.push_back(naive(c, i ? moved : in, scale, [&](double v) { return nearest(v, form); }));
  }

  int failures = 0;
  for (const std::string& isa : isas) {
    fastadapters_set_cpu_isa(isa.c_str());
    auto fail = [&](const std::string& what) {
      ++failures;
      std::printf("case %d, %s, %s: %s\n", index, form.name, isa.c_str(), what.c_str());
    };
    auto once = [&](const cpu::Threads& threads, unsigned wanted) {
      auto out = run(c, in, scale, dtype, threads, wanted);
      for (int i = 0; i < kOutputs; ++i) {
        if (~wanted >> i & 1) {
          for (double v : out[size_t(i)])
            if (!std::isnan(v)) return fail(std::string(kNames[i]) + " was not asked for");
          continue;
        }
        std::string problem = difference(out, gold, bases, eps, i);
        if (!problem.empty()) fail(std::string(kNames[i]) + ", " + problem);
      }
      if (!same_bits(out, run(c, in, scale, dtype, threads, wanted))) fail("two runs differ");
    };
    once(threads<1>(), 0xff);
    once(threads<3>(), 0xff);
    once(threads<3>(), 0b10101011);
    once(threads<1>(), 0b01010111);
  }
  return failures;
}

}  // namespace
}  // namespace fastadapters

int main() { return fastadapters::check_samples(fastadapters::kCases, fastadapters::check) != 0; }

// The multi-modal adapter's head as its definition has it, in double precision, row by row.
#pragma once

#include <cmath>
#include <vector>

#include "activations.h"
#include "multimodal.h"

namespace fastadapters {

namespace {

using Numbers = Values;

// In the order of the gradients: text, image, then as in MultimodalParameters; empty where absent.
constexpr size_t kTensors = 16;
using Tensors = std::vector<Numbers>;
enum : size_t {
  kText,
  kImage,
  kDown,
  kDownBias,
  kDown2,
  kDownBias2,
  kIn,
  kInBias,
  kOut,
  kOutBias,
  kUp,
  kUpBias,
  kUp2,
  kUpBias2,
  kBlend,
  kScale
};

struct Shape {
  int64_t texts, items, dim, width, heads, down_hidden, up_hidden;
};

Numbers linear(const Numbers& x, const Numbers& weight, const Numbers& bias) {
  Numbers y = bias;
  for (size_t i = 0; i < y.size(); ++i)
    for (size_t j = 0; j < x.size(); ++j) y[i] += weight[i * x.size() + j] * x[j];
  return y;
}

Numbers two_layers(Numbers x, const Tensors& t, size_t first, Activation activation) {
  x = linear(x, t[first], t[first + 1]);
  if (t[first + 2].empty()) return x;
  for (double& v : x) v = activate(activation, v).first;
  return linear(x, t[first + 2], t[first + 3]);
}

Numbers unit(Numbers x) {
  double square = 0;
  for (double v : x) square += v * v;
  for (double& v : x) v /= std::fmax(std::sqrt(square), 1e-12);
  return x;
}

Numbers mix(double a, const Numbers& x, double b, const Numbers& y) {
  Numbers z(x.size());
  for (size_t i = 0; i < x.size(); ++i) z[i] = a * x[i] + b * y[i];
  return z;
}

// What the adapter makes of token `own` of a sequence of texts and one image, the last.
Numbers adapt_naively(const Shape& s, const Tensors& t, const float (&bias)[2][2],
                      const std::vector<Numbers>& qkv, size_t own) {
  const size_t e = size_t(s.width), head = e / size_t(s.heads), last = qkv.size() - 1;
  Numbers out(e, 0.0);
  for (size_t h = 0; h < size_t(s.heads); ++h) {
    Numbers scores(qkv.size());
    double top = -INFINITY, total = 0;
    for (size_t k = 0; k < qkv.size(); ++k) {
      scores[k] = bias[own == last][k == last];
      for (size_t j = h * head; j < (h + 1) * head; ++j)
        scores[k] += qkv[own][j] * qkv[k][e + j] / std::sqrt(double(head));
      top = std::fmax(top, scores[k]);
    }
    if (top == -INFINITY) continue;
    for (double& v : scores) total += v = std::exp(v - top);
    for (size_t k = 0; k < qkv.size(); ++k)
      for (size_t j = h * head; j < (h + 1) * head; ++j)
        out[j] += scores[k] / total * qkv[k][2 * e + j];
  }
  return two_layers(linear(out, t[kOut], t[kOutBias]), t, kUp, Activation::gelu);
}

// logits [B, C]
Numbers multimodal_naively(const Shape& s, const Tensors& t, const float (&bias)[2][2], Adapt adapt,
                           Activation activation) {
  auto row = [&](size_t tensor, int64_t i) {
    auto begin = t[tensor].begin() + i * s.dim;
    return Numbers(begin, begin + s.dim);
  };
  const double share = t[kBlend][0], scale = t[kScale][0];
  auto project = [&](const Numbers& x) {
    return linear(two_layers(x, t, kDown, activation), t[kIn], t[kInBias]);
  };
  std::vector<Numbers> tokens;
  for (int64_t c = 0; c < s.texts; ++c) tokens.push_back(project(row(kText, c)));
  tokens.emplace_back();
  Numbers logits;
  for (int64_t b = 0; b < s.items; ++b) {
    Numbers image = row(kImage, b);
    tokens.back() = project(image);
    if (adapt != Adapt::image) image = unit(image);
    if (adapt != Adapt::text)
      image =
          mix(share, unit(adapt_naively(s, t, bias, tokens, size_t(s.texts))), 1 - share, image);
    image = unit(image);
    for (int64_t c = 0; c < s.texts; ++c) {
      Numbers text = unit(row(kText, c));
      if (adapt != Adapt::image)
        text =
            unit(mix(share, unit(adapt_naively(s, t, bias, tokens, size_t(c))), 1 - share, text));
      double dot = 0;
      for (size_t i = 0; i < text.size(); ++i) dot += text[i] * image[i];
      logits.push_back(scale * dot);
    }
  }
  return logits;
}

}  // namespace
}  // namespace fastadapters

// The CPU kernels of the multi-modal adapter's head on raw pointers, every instruction set, with no
// Python and no PyTorch around them, so that sanitizers see all there is. Logits are compared with
// the definition in double precision, gradients with its central differences along a random
// direction. Prints one line per failure; exits 1 if there was any.
#include <cstdio>
#include <random>

#include "cpu/isa.h"
#include "cpu/multimodal/multimodal.h"
#include "multimodal_naive.h"

namespace fastadapters {
namespace {

constexpr float kBlocked = -INFINITY;
constexpr const char* kNames[kTensors] = {
    "text",        "image",     "down_weight", "down_bias",  "down_weight_2", "down_bias_2",
    "in_weight",   "in_bias",   "out_weight",  "out_bias",   "up_weight",     "up_bias",
    "up_weight_2", "up_bias_2", "blend",       "logit_scale"};

struct Sample {
  Shape shape;
  float bias[2][2];
  Adapt adapt = Adapt::both;
  Activation activation = Activation::identity;
};

// {C, B, D, E, H, down_hidden, up_hidden}: around the sizes of the lanes, blocks and tiles.
const Sample kSamples[] = {
    {{7, 5, 12, 8, 2, 0, 6}, {{0, 1}, {1, 0}}},
    {{1, 1, 2, 1, 1, 0, 1}, {{0, 1}, {1, 0}}},
    {{50, 17, 20, 12, 4, 5, 9}, {{0.5f, -1}, {1, 0}}, Adapt::text, Activation::gelu},
    {{53, 33, 17, 10, 2, 0, 0}, {{0, 1}, {1, 0}}, Adapt::both},
    {{19, 9, 24, 20, 4, 3, 17}, {{kBlocked, 0}, {0, kBlocked}}, Adapt::both, Activation::silu},
    {{18, 3, 9, 6, 3, 0, 0}, {{0, kBlocked}, {0.3f, 0}}, Adapt::both},
    {{4, 40, 10, 5, 1, 0, 33}, {{kBlocked, kBlocked}, {kBlocked, 0}}, Adapt::text},
    {{9, 6, 11, 4, 2, 7, 3}, {{0, 0}, {0.5f, 0}}, Adapt::image, Activation::relu},
    {{3, 0, 6, 4, 2, 0, 3}, {{0, 1}, {1, 0}}},
};

Tensors draw(const Sample& s, std::mt19937_64& generator, const Format& form) {
  const Shape& n = s.shape;
  const int64_t down = n.down_hidden ? n.down_hidden : n.width;
  const int64_t up = n.up_hidden ? n.up_hidden : n.dim;
  const int64_t sizes[kTensors][2] = {{n.texts * n.dim, 1},
                                      {n.items * n.dim, 1},
                                      {down * n.dim, n.dim},
                                      {down, 9},
                                      {n.width * n.down_hidden, n.down_hidden},
                                      {n.down_hidden ? n.width : 0, 9},
                                      {3 * n.width * n.width, n.width},
                                      {3 * n.width, 9},
                                      {n.width * n.width, n.width},
                                      {n.width, 9},
                                      {up * n.width, n.width},
                                      {up, 9},
                                      {n.dim * n.up_hidden, n.up_hidden},
                                      {n.up_hidden ? n.dim : 0, 9},
                                      {1, 1},
                                      {1, 1}};
  Tensors tensors;
  for (const auto& [size, spread] : sizes) {
    std::normal_distribution<double> distribution(0, 1 / std::sqrt(double(spread)));
    Numbers values(static_cast<size_t>(size));
    for (double& v : values) v = nearest(distribution(generator), form);
    tensors.push_back(values);
  }
  tensors[kBlend] = {nearest(0.3, form)};
  tensors[kScale] = {nearest(20, form)};
  return tensors;
}

// Logits, then the gradients of the tensors, of which those not wanted stay NaN.
std::vector<Values> run(const Sample& s, const Tensors& in, const Values& cotangent, Dtype dtype,
                        const cpu::Threads& threads, unsigned long wanted) {
  const Shape& n = s.shape;
  auto array = [&](int64_t size) { return Array(dtype, {1, 1, 1}, size, 0); };
  std::vector<Array> tensors, gradients;
  for (const Numbers& values : in) {
    tensors.push_back(array(int64_t(values.size())));
    tensors.back().fill(values);
    gradients.push_back(array(int64_t(values.size())));
  }
  Array logits = array(n.items * n.texts), d_logits = array(n.items * n.texts);
  d_logits.fill(cotangent);

  Multimodal p;
  p.texts = n.texts;
  p.items = n.items;
  p.dim = n.dim;
  p.width = n.width;
  p.heads = n.heads;
  p.down_hidden = n.down_hidden;
  p.up_hidden = n.up_hidden;
  p.text = {tensors[kText].memory.data(), n.dim, dtype};
  p.image = {tensors[kImage].memory.data(), n.dim, dtype};
  for (int i = 0; i < 4; ++i) p.bias[i / 2][i % 2] = s.bias[i / 2][i % 2];
  p.adapt = s.adapt;
  p.down_activation = s.activation;
  p.out_dtype = dtype;
  auto members = [](MultimodalParameters& of) {
    return std::vector<Parameter*>{
        &of.down_weight, &of.down_bias,  &of.down_weight_2, &of.down_bias_2, &of.in_weight,
        &of.in_bias,     &of.out_weight, &of.out_bias,      &of.up_weight,   &of.up_bias,
        &of.up_weight_2, &of.up_bias_2,  &of.blend,         &of.logit_scale};
  };
  for (size_t i = 2; i < kTensors; ++i)
    if (!in[i].empty()) *members(p.parameters)[i - 2] = tensors[i].as_parameter();
  std::vector<float> state(size_t(cpu::multimodal_logits_state(p)), float(kNaN));
  p.state = state.data();

  MultimodalForward forward;
  static_cast<Multimodal&>(forward) = p;
  forward.logits = logits.memory.data();
  cpu::multimodal_logits_forward(forward, threads);
  Values with_state = logits.read();
  forward.state = nullptr;
  cpu::multimodal_logits_forward(forward, threads);
  if (!same_bits({with_state}, {logits.read()})) std::printf("state changes the logits\n");

  MultimodalBackward backward;
  static_cast<Multimodal&>(backward) = p;
  backward.d_logits = d_logits.memory.data();
  auto wants = [&](size_t i) { return !in[i].empty() && wanted >> i & 1; };
  if (wants(kText)) backward.d_text = {gradients[kText].memory.data(), n.dim, dtype};
  if (wants(kImage)) backward.d_image = {gradients[kImage].memory.data(), n.dim, dtype};
  for (size_t i = 2; i < kTensors; ++i)
    if (wants(i)) *members(backward.gradients)[i - 2] = gradients[i].as_parameter();
  cpu::multimodal_logits_backward(backward, threads);

  std::vector<Values> out = {logits.read()};
  for (Array& a : gradients) out.push_back(a.read());
  return out;
}

double dot(const Values& a, const Values& b) {
  double total = 0;
  for (size_t i = 0; i < a.size(); ++i) total += a[i] * b[i];
  return total;
}

int check(const Sample& s, int index, Dtype dtype, const std::vector<std::string>& isas) {
  const Format& form = format(dtype);
  const double eps = std::ldexp(1.0, 1 - form.bits);
  std::mt19937_64 generator(static_cast<uint64_t>(index));
  std::normal_distribution<double> normal;
  const Tensors in = draw(s, generator, form);
  Values cotangent(size_t(s.shape.texts * s.shape.items));
  for (double& v : cotangent) v = nearest(normal(generator), form);
  auto naive = [&](const Tensors& t) {
    return multimodal_naively(s.shape, t, s.bias, s.adapt, s.activation);
  };
  const Values gold = naive(in);

  // The derivative of cotangent . logits by each tensor along a direction.
  Tensors directions;
  Values slopes;
  for (size_t i = 0; i < kTensors; ++i) {
    constexpr double step = 1e-5;
    Numbers direction(in[i].size());
    for (double& v : direction) v = normal(generator);
    Tensors ahead = in, behind = in;
    for (size_t j = 0; j < direction.size(); ++j) {
      ahead[i][j] += step * direction[j];
      behind[i][j] -= step * direction[j];
    }
    slopes.push_back((dot(cotangent, naive(ahead)) - dot(cotangent, naive(behind))) / (2 * step));
    directions.push_back(direction);
  }

  int failures = 0;
  auto fail = [&](const std::string& isa, const char* name, const std::string& problem) {
    ++failures;
    std::printf("sample %d, %s, %s: %s: %s\n", index, form.name, isa.c_str(), name,
                problem.c_str());
  };
  for (const std::string& isa : isas) {
    fastadapters_set_cpu_isa(isa.c_str());
    struct Run {
      cpu::Threads threads;
      unsigned long wanted;
    };
    for (const Run& how :
         {Run{threads<3>(), 0xffff}, Run{threads<1>(), 0xffff}, Run{threads<3>(), 0x5555},
          Run{threads<1>(), 0xaaaa}, Run{threads<1>(), 0x3000}, Run{threads<1>(), 0x8000}}) {
      const auto out = run(s, in, cotangent, dtype, how.threads, how.wanted);
      double error = greatest(out[0] - gold);
      if (!(error <= (eps + 1e-5) * greatest(gold)) && !gold.empty())
        fail(isa, "logits", "error " + std::to_string(error));
      for (size_t i = 0; i < kTensors; ++i) {
        const Values& gradient = out[i + 1];
        if (~how.wanted >> i & 1) {
          for (double v : gradient)
            if (!std::isnan(v)) fail(isa, kNames[i], "written, though not asked for");
          continue;
        }
        double size = std::sqrt(dot(gradient, gradient)) + std::fabs(slopes[i]);
        double off = std::fabs(dot(gradient, directions[i]) - slopes[i]);
        if (!(off <= (4 * eps + 2e-4) * size + 1e-4))
          fail(isa, kNames[i],
               "slope off by " + std::to_string(off) + " of " + std::to_string(size));
      }
      if (!same_bits(out, run(s, in, cotangent, dtype, how.threads, how.wanted)))
        fail(isa, "all", "two runs differ");
    }
  }
  return failures;
}

}  // namespace
}  // namespace fastadapters

int main() { return fastadapters::check_samples(fastadapters::kSamples, fastadapters::check) != 0; }

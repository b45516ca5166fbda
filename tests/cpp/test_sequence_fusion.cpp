// The CPU kernels of sequence fusion on raw pointers, every instruction set, with no Python and no
// PyTorch around them, so that sanitizers see all there is. Results are compared with a naive loop
// in double precision under the rule of tests/compare.py. Prints one line per failure; exits 1 if
// there was any.
#include <cstdio>
#include <random>

#include "cpu/isa.h"
#include "cpu/sequence_fusion/sequence_fusion.h"
#include "sequence_fusion_naive.h"

namespace fastadapters {
namespace {

constexpr int kBases = 3;
constexpr const char* kKinds[] = {"dx", "d_down_weight", "d_down_bias", "d_time_factor",
                                  "d_feature_factor"};

// One forward and one backward pass of the kernels in use. Bit `kind * M + m` of `wanted` is a
// gradient; those not wanted stay NaN.
std::vector<Values> run(const Sample& s, const Data& in, Dtype dtype, const cpu::Threads& threads,
                        unsigned long wanted, bool saved_z) {
  const Dtype own = s.float_parameters ? Dtype::float32 : dtype;
  const Dtype stored = s.float_storage ? Dtype::float32 : dtype;
  const int64_t m = s.modalities();
  auto array = [&](Dtype type, int64_t tokens, int64_t width, const Values& values) {
    Array a(type, {1, s.items, tokens}, width, s.gap);
    if (!values.empty()) a.fill(values);
    return a;
  };
  auto parameter = [&](int64_t n, const Values& values) {
    Array a(own, {1, 1, 1}, n, 0);
    if (!values.empty()) a.fill(values);
    return a;
  };
  std::vector<Array> x, parameters, gradients, dx;
  int64_t n_z = 0;
  for (size_t i = 0; i < size_t(m); ++i) {
    int64_t t = s.tokens[i], all = t + s.spare;
    x.push_back(array(stored, t, s.dims[i], in.x[i]));
    dx.push_back(array(stored, t, s.dims[i], {}));
    const Values* given[] = {&in.down[i], &in.bias[i], &in.time[i], &in.feature[i]};
    const int64_t sizes[] = {s.width * s.dims[i], s.width, s.time_rank * all * s.out_len,
                             s.feature_rank * s.width * s.dim};
    for (int kind = 0; kind < 4; ++kind) {
      parameters.push_back(parameter(sizes[kind], *given[kind]));
      gradients.push_back(parameter(sizes[kind], {}));
    }
    n_z += s.items * t * s.width;
  }
  Array residual = array(stored, s.out_len, s.dim, in.residual);
  Array dy = array(stored, s.out_len, s.dim, in.dy), y = array(stored, s.out_len, s.dim, {});
  Array z(dtype, {1, 1, 1}, n_z, 0);
  Array products(Dtype::float32, {1, 1, 1}, m * s.items * s.rank() * s.out_len * s.width, 0);

  SequenceFusion p;
  p.dtype = dtype;
  p.out_dtype = stored;
  p.modalities = int(m);
  p.items = s.items;
  p.out_len = s.out_len;
  p.dim = s.dim;
  p.time_rank = s.time_rank;
  p.feature_rank = s.feature_rank;
  p.summed = s.summed;
  p.activation = s.activation;
  p.add_leading = s.leading;
  p.products = reinterpret_cast<float*>(products.memory.data());
  for (size_t i = 0; i < size_t(m); ++i) {
    Modality& to = p.modality[i];
    to.x_dtype = stored;
    to.x = x[i].as_rows();
    to.tokens = s.tokens[i];
    to.dim = s.dims[i];
    to.width = s.width;
    to.factor_tokens = s.tokens[i] + s.spare;
    if (s.lengths) to.lengths = in.lengths[i].data();
    to.down_weight = parameters[4 * i].as_parameter();
    if (s.bias) to.down_bias = parameters[4 * i + 1].as_parameter();
    to.time_factor = parameters[4 * i + 2].as_parameter();
    to.feature_factor = parameters[4 * i + 3].as_parameter();
  }
  if (saved_z) p.z = z.memory.data();

  SequenceFusionForward forward{};
  static_cast<SequenceFusion&>(forward) = p;
  if (s.residual) forward.residual = residual.as_rows();
  forward.y = y.as_rows();
  cpu::sequence_fusion_forward(forward, threads);

  SequenceFusionBackward backward{};
  static_cast<SequenceFusion&>(backward) = p;
  backward.dy = dy.as_rows();
  for (size_t i = 0; i < size_t(m); ++i) {
    auto& to = backward.gradients[i];
    Parameter* slots[] = {&to.d_down_weight, &to.d_down_bias, &to.d_time_factor,
                          &to.d_feature_factor};
    auto wants = [&](size_t kind) { return wanted >> (kind * size_t(m) + i) & 1; };
    if (wants(0)) to.dx = dx[i].as_rows();
    for (size_t kind = 0; kind < 4; ++kind)
      if (wants(kind + 1)) *slots[kind] = gradients[4 * i + kind].as_parameter();
    bool through = wants(0) || wants(1) || wants(2) || wants(3);
    if (!wants(1) && (saved_z || !through)) backward.modality[i].x = {};
  }
  cpu::sequence_fusion_backward(backward, threads);

  std::vector<Values> out = {y.read()};
  for (Array& a : dx) out.push_back(a.read());
  for (size_t kind = 0; kind < 4; ++kind)
    for (size_t i = 0; i < size_t(m); ++i) out.push_back(gradients[4 * i + kind].read());
  return out;
}

int check(const Sample& s, int index, Dtype dtype, const std::vector<std::string>& isas) {
  const Format& form = format(dtype);
  const double eps = std::ldexp(1.0, 1 - form.bits);
  std::mt19937_64 generator(static_cast<uint64_t>(index));
  // Values that are exact in the compute dtype, as the kernels see them.
  auto draw = [&](int64_t n, double spread) {
    std::normal_distribution<double> distribution(0, spread);
    Values values(static_cast<size_t>(n));
    for (double& v : values) v = nearest(distribution(generator), form);
    return values;
  };
  Data in;
  for (size_t i = 0; i < s.tokens.size(); ++i) {
    int64_t t = s.tokens[i], d = s.dims[i];
    in.x.push_back(draw(s.items * t * d, 1));
    in.down.push_back(draw(s.width * d, 1 / std::sqrt(double(d))));
    in.bias.push_back(draw(s.width, 0.5));
    in.time.push_back(draw(s.time_rank * (t + s.spare) * s.out_len, 1 / std::sqrt(double(t))));
    in.feature.push_back(draw(s.feature_rank * s.width * s.dim, 1 / std::sqrt(double(s.width))));
    in.lengths.emplace_back();
    for (int64_t item = 0; item < s.items; ++item)
      in.lengths[i].push_back(s.lengths ? int64_t(generator() % uint64_t(t + 1)) : t);
  }
  in.residual = draw(s.items * s.out_len * s.dim, 1);
  in.dy = draw(s.items * s.out_len * s.dim, 1);

  auto gold = naive(s, in, Round{nullptr});
  // As in tests/compare.py: several bases, of inputs that differ in the last bit.
  std::vector<std::vector<Values>> bases;
  for (int base = 0; base < kBases; ++base) {
    Data moved = in;
    for (auto* group : {&moved.x, &moved.down, &moved.time, &moved.feature})
      for (Values& values : *group)
        for (double& v : values)
          if (base) v = nearest(v * (1 + eps * (int(generator() % 3) - 1)), form);
    bases.push_back(naive(s, moved, Round{&form}));
  }

  const unsigned long m = s.tokens.size(), all = (1ul << 5 * m) - 1;
  unsigned long present = all;
  if (!s.bias) present &= ~(((1ul << m) - 1) << 2 * m);
  int failures = 0;
  for (const std::string& isa : isas) {
    fastadapters_set_cpu_isa(isa.c_str());
    struct Run {
      cpu::Threads threads;
      unsigned long wanted;
      bool saved_z;
    };
    for (const Run& how : {Run{threads<3>(), present, true}, Run{threads<1>(), present, false},
                           Run{threads<3>(), present & 0x5555555555, true},
                           Run{threads<1>(), present & 0xaaaaaaaaaa, false}}) {
      auto out = run(s, in, dtype, how.threads, how.wanted, how.saved_z);
      for (size_t i = 0; i < out.size(); ++i) {
        if (i && ~how.wanted >> (i - 1) & 1) continue;
        std::string problem = difference(out, gold, bases, eps, int(i));
        if (problem.empty()) continue;
        ++failures;
        std::string name =
            i ? kKinds[(i - 1) / m] + std::string(" ") + std::to_string((i - 1) % m) : "y";
        std::printf("sample %d, %s, %s: %s with %d threads, %s\n", index, form.name, isa.c_str(),
                    name.c_str(), how.threads.count, problem.c_str());
      }
      if (!same_bits(out, run(s, in, dtype, how.threads, how.wanted, how.saved_z))) {
        ++failures;
        std::printf("sample %d, %s, %s: two runs differ\n", index, form.name, isa.c_str());
      }
    }
  }
  return failures;
}

}  // namespace
}  // namespace fastadapters

int main() { return fastadapters::check_samples(fastadapters::kSamples, fastadapters::check) != 0; }

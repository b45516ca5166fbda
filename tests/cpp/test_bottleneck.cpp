// The CPU kernels on raw pointers, every instruction set, with no Python and no PyTorch around
// them, so that sanitizers see all there is. Results are compared with a naive loop in double
// precision under the rule of tests/compare.py. Prints one line per failure; exits 1 if there was
// any.
#include <cstdio>
#include <random>

#include "bottleneck_naive.h"
#include "cpu/bottleneck/bottleneck.h"
#include "cpu/isa.h"

namespace fastadapters {
namespace {

constexpr int kBases = 3;

// One forward and one backward pass of the kernels in use; outputs not in `wanted` stay NaN.
std::vector<Values> run(const Case& c, const Inputs& in, Dtype dtype, const cpu::Threads& threads,
                        unsigned wanted) {
  const int64_t d = c.dim, n = c.out(), r = c.bottleneck, m = c.rows[0] * c.rows[1] * c.rows[2];
  const Dtype own = c.float_parameters ? Dtype::float32 : dtype;
  const Dtype x_dtype = c.float_x ? Dtype::float32 : dtype;
  const Dtype out_dtype = c.float_y ? Dtype::float32 : dtype;
  auto matrix = [&](Dtype stored, int64_t columns, const Values& values, bool broadcast = false) {
    Array array(stored, c.rows, columns, c.gap, broadcast);
    if (!values.empty()) array.fill(values);
    return array;
  };
  auto parameter = [&](int64_t n, const Values& values) {
    Array array(own, {1, 1, 1}, n, 0);
    if (!values.empty()) array.fill(values);
    return array;
  };
  const int64_t scales = c.scale == Scale::channel ? n : 1;
  Array x = matrix(x_dtype, d, in.x), residual = matrix(out_dtype, n, in.residual);
  Array dy = matrix(out_dtype, n, in.dy, c.broadcast_dy);
  Array down = parameter(r * d, in.down_weight), down_bias = parameter(r, in.down_bias);
  Array up = parameter(n * r, in.up_weight), up_bias = parameter(n, in.up_bias);
  Array norm = parameter(d, in.norm_weight), norm_bias = parameter(d, in.norm_bias);
  Array scale = parameter(scales, in.scale);
  Array y = matrix(out_dtype, n, {}), dx = matrix(x_dtype, d, {});
  Array d_down = parameter(r * d, {}), d_down_bias = parameter(r, {});
  Array d_up = parameter(n * r, {}), d_up_bias = parameter(n, {}), d_norm = parameter(d, {});
  Array d_norm_bias = parameter(d, {}), d_scale = parameter(scales, {});
  Array z(dtype, {1, 1, m}, r, 0), stats(Dtype::float32, {1, 1, m}, 2, 0);

  Bottleneck p;
  p.dtype = dtype;
  p.x_dtype = x_dtype;
  p.out_dtype = out_dtype;
  std::copy(c.rows, c.rows + 3, p.rows);
  p.dim = d;
  p.out_dim = n;
  p.bottleneck = r;
  p.x = x.as_rows();
  p.down_weight = down.as_parameter();
  p.up_weight = up.as_parameter();
  if (c.bias) {
    p.down_bias = down_bias.as_parameter();
    p.up_bias = up_bias.as_parameter();
  }
  if (c.norm) p.norm_weight = norm.as_parameter();
  if (c.norm_bias) p.norm_bias = norm_bias.as_parameter();
  if (c.scale != Scale::number) p.scale = scale.as_parameter();
  p.channel_scale = c.scale == Scale::channel;
  p.scale_value = float(in.scale_value);
  p.norm_eps = float(in.norm_eps);
  p.activation = c.activation;
  if (c.dropout > 0 || c.input_dropout > 0) p.seed = in.seed;
  p.dropout = c.dropout;
  p.input_dropout = c.input_dropout;
  p.z = z.memory.data();
  if (c.norm) p.stats = reinterpret_cast<float*>(stats.memory.data());

  BottleneckForward forward{p, {}, y.as_rows()};
  if (c.residual == Residual::self) forward.residual = p.x;
  if (c.residual == Residual::other) forward.residual = residual.as_rows();
  cpu::bottleneck_forward(forward, threads);

  BottleneckBackward backward{};
  static_cast<Bottleneck&>(backward) = p;
  backward.dy = dy.as_rows();
  backward.add_dy = c.residual == Residual::self;
  if (wanted >> 1 & 1) backward.dx = dx.as_rows();
  Array* gradients[] = {&d_down, &d_down_bias, &d_up, &d_up_bias, &d_norm, &d_norm_bias, &d_scale};
  Parameter* slots[] = {&backward.d_down_weight, &backward.d_down_bias,   &backward.d_up_weight,
                        &backward.d_up_bias,     &backward.d_norm_weight, &backward.d_norm_bias,
                        &backward.d_scale};
  for (int i = 0; i < 7; ++i)
    if (wanted >> (i + 2) & 1) *slots[i] = gradients[i]->as_parameter();
  if (!backward.needs_x()) backward.x = {};
  if (!backward.needs_z()) backward.z = nullptr;
  cpu::bottleneck_backward(backward, threads);

  std::vector<Values> out = {y.read(), dx.read()};
  for (Array* gradient : gradients) out.push_back(gradient->read());
  return out;
}

int check(const Case& c, int index, Dtype dtype, const std::vector<std::string>& isas) {
  const int64_t m = c.rows[0] * c.rows[1] * c.rows[2], d = c.dim, n = c.out(), r = c.bottleneck;
  const Format& form = format(dtype);
  std::mt19937_64 generator(static_cast<uint64_t>(index));
  // Values that are exact in the compute dtype, as the kernels see them.
  auto draw = [&](int64_t n, double spread, double centre = 0) {
    std::normal_distribution<double> distribution(centre, spread);
    Values values(static_cast<size_t>(n));
    for (double& v : values) v = nearest(distribution(generator), form);
    return values;
  };
  Inputs in;
  in.x = draw(m * d, 1, 0.5);
  in.residual = draw(m * n, 1);
  in.dy = draw(m * n, 1);
  if (c.broadcast_dy)
    for (int64_t i = 0; i < m * n; ++i) in.dy[size_t(i)] = in.dy[size_t(i % n)];
  in.down_weight = draw(r * d, 1 / std::sqrt(double(d)));
  in.down_bias = draw(r, 0.5);
  in.up_weight = draw(n * r, 1 / std::sqrt(double(r)));
  in.up_bias = draw(n, 0.5);
  in.norm_weight = draw(d, 0.5, 1);
  in.norm_bias = draw(d, 0.5);
  in.scale = draw(c.scale == Scale::channel ? n : 1, 1);

  unsigned present = 0b11;
  present |= 0b0000010100;  // the two weights
  if (c.bias) present |= 0b0000101000;
  if (c.norm) present |= 0b0001000000;
  if (c.norm_bias) present |= 0b0010000000;
  if (c.scale != Scale::number) present |= 0b0100000000;

  const double eps = std::ldexp(1.0, 1 - form.bits);
  auto gold = naive(c, in, Exact{});
  // As in tests/compare.py: several bases, of inputs that differ in the last bit.
  std::vector<std::vector<Values>> bases;
  for (int i = 0; i < kBases; ++i) {
    Inputs moved = in;
    for (Values* values : {&moved.x, &moved.dy, &moved.down_weight, &moved.up_weight, &moved.scale})
      for (double& v : *values) v = nearest(v * (1 + eps * (int(generator() % 3) - 1)), form);
    bases.push_back(naive(c, i ? moved : in, Rounded{form}));
  }

  int failures = 0;
  for (const std::string& isa : isas) {
    fastadapters_set_cpu_isa(isa.c_str());
    auto fail = [&](const std::string& what) {
      ++failures;
      std::printf("case %d, %s, %s: %s\n", index, form.name, isa.c_str(), what.c_str());
    };
    struct Run {
      cpu::Threads threads;
      unsigned wanted;
    };
    for (const Run& how : {Run{threads<3>(), present}, Run{threads<1>(), present & 0b0101010101},
                           Run{threads<3>(), present & 0b1010101011}}) {
      auto out = run(c, in, dtype, how.threads, how.wanted);
      for (int i = 0; i < kOutputs; ++i) {
        if (~how.wanted >> i & 1) continue;
        bool is_parameter = i > 1;
        double own_eps = is_parameter && c.float_parameters ? std::ldexp(1.0, -23) : eps;
        std::string problem = difference(out, gold, bases, own_eps, i);
        if (!problem.empty())
          fail(std::string(kNames[i]) + " with " + std::to_string(how.threads.count) +
               " threads, " + problem);
      }
      if (how.wanted == present && !same_bits(out, run(c, in, dtype, how.threads, present)))
        fail("two runs differ");
    }
  }
  return failures;
}

int main() {
  int failures = check_samples(kCases, check);
  if (fastadapters_set_cpu_isa("no such set")) {
    std::puts("an unknown instruction set was accepted");
    ++failures;
  }
  return failures != 0;
}

}  // namespace
}  // namespace fastadapters

int main() { return fastadapters::main(); }

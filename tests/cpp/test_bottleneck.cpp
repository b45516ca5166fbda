// The CPU kernels on raw pointers, every instruction set, with no Python and no PyTorch around
// them, so that sanitizers see all there is. Results are compared with a naive loop in double
// precision under the rule of tests/compare.py. Prints one line per failure; exits 1 if there was
// any.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "bottleneck.h"
#include "cpu/isa.h"
#include "philox.h"

namespace fastadapters {
namespace {

constexpr int kBases = 3;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Format {
  const char* name;
  int bits;          // of the significand, the hidden one included
  int min_exponent;  // of the smallest normal number, as in frexp
};
constexpr Format kFormats[] = {{"float32", 24, -125}, {"bfloat16", 8, -125}, {"float16", 11, -13}};

const Format& format(Dtype dtype) { return kFormats[int(dtype)]; }
size_t item_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// To the nearest value of a format, ties to even.
double nearest(double v, const Format& f) {
  if (v == 0 || !std::isfinite(v)) return v;
  int exponent;
  std::frexp(v, &exponent);
  int last_bit = std::max(exponent, f.min_exponent) - f.bits;
  return std::ldexp(std::nearbyint(std::ldexp(v, -last_bit)), last_bit);
}

double load(Dtype dtype, const void* p) {
  float f;
  uint16_t half;
  uint32_t bits;
  if (dtype == Dtype::float32) {
    std::memcpy(&f, p, 4);
    return f;
  }
  std::memcpy(&half, p, 2);
  if (dtype == Dtype::bfloat16) {
    bits = uint32_t(half) << 16;
    std::memcpy(&f, &bits, 4);
    return f;
  }
  int exponent = half >> 10 & 31, significand = half & 1023;
  double magnitude = exponent == 31 ? (significand ? kNaN : std::numeric_limits<double>::infinity())
                     : exponent     ? std::ldexp(1024 + significand, exponent - 25)
                                    : std::ldexp(significand, -24);
  return half >> 15 ? -magnitude : magnitude;
}

void store(Dtype dtype, void* p, double v) {
  float f = float(nearest(v, format(dtype)));
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint16_t half = uint16_t(bits >> 16);
  if (dtype == Dtype::float16) {
    double magnitude = std::fabs(double(f));
    int exponent;
    std::frexp(magnitude, &exponent);
    half = std::isnan(v) ? 0x7e00
           : exponent < -13
               ? uint16_t(std::ldexp(magnitude, 24))
               : uint16_t(((exponent + 14) << 10) + std::ldexp(magnitude, 11 - exponent) - 1024);
    if (v < 0) half |= 0x8000;
  }
  if (dtype == Dtype::float32)
    std::memcpy(p, &f, 4);
  else
    std::memcpy(p, &half, 2);
}

using Values = std::vector<double>;

// An array in the memory of exactly its size, so that reading one element past it is an error.
struct Array {
  Dtype dtype;
  int64_t width;  // D
  int64_t rows[3] = {1, 1, 1};
  int64_t strides[3] = {0, 0, 0};
  std::vector<unsigned char> memory;

  Array(Dtype dtype, const int64_t (&shape)[3], int64_t width, int64_t gap, bool broadcast = false)
      : dtype(dtype), width(width) {
    std::copy(shape, shape + 3, rows);
    if (!broadcast) {
      strides[2] = width + gap;
      strides[1] = rows[2] * strides[2] + gap;
      strides[0] = rows[1] * strides[1] + gap;
    }
    int64_t last = 0;
    for (int i = 0; i < 3; ++i) last += (rows[i] - 1) * strides[i];
    memory.resize(count() ? size_t(last + width) * item_size(dtype) : 0);
    fill(Values(size_t(count() * width), kNaN));
  }

  int64_t count() const { return rows[0] * rows[1] * rows[2]; }
  unsigned char* at(int64_t row, int64_t column) {
    int64_t offset = row / rows[2] / rows[1] * strides[0] + row / rows[2] % rows[1] * strides[1] +
                     row % rows[2] * strides[2] + column;
    return memory.data() + offset * int64_t(item_size(dtype));
  }
  void fill(const Values& values) {
    for (int64_t i = 0; i < int64_t(values.size()); ++i)
      store(dtype, at(i / width, i % width), values[size_t(i)]);
  }
  Values read() {
    Values values(size_t(count() * width));
    for (int64_t i = 0; i < int64_t(values.size()); ++i)
      values[size_t(i)] = load(dtype, at(i / width, i % width));
    return values;
  }
  Rows as_rows() { return {memory.data(), {strides[0], strides[1], strides[2]}}; }
  Parameter as_parameter() { return {memory.data(), dtype}; }
};

enum class Residual { none, self, other };
enum class Scale { number, learnable, channel };

struct Case {
  int64_t rows[3];
  int64_t dim, bottleneck;
  Activation activation;
  Residual residual;
  Scale scale;
  bool bias, norm, norm_bias;
  double dropout;
  int64_t gap = 0;                // between rows, in elements
  bool broadcast_dy = false;      // one row of dy for all, by strides of 0
  bool float_parameters = false;  // float32 parameters whatever the dtype of x
};

constexpr auto kIdentity = Activation::identity;
constexpr auto kRelu = Activation::relu;
constexpr auto kGelu = Activation::gelu;
constexpr auto kTanh = Activation::gelu_tanh;
constexpr auto kSilu = Activation::silu;
constexpr auto kQuick = Activation::quick_gelu;

const Case kCases[] = {
    {{1, 1, 0}, 8, 4, kRelu, Residual::self, Scale::channel, true, true, true, 0.5},
    {{1, 1, 1}, 1, 1, kIdentity, Residual::none, Scale::number, false, false, false, 0},
    {{1, 1, 1}, 100, 33, kGelu, Residual::self, Scale::learnable, true, true, true, 0.3},
    {{1, 1, 7}, 10, 10, kRelu, Residual::other, Scale::channel, true, false, false, 0, 3},
    {{3, 5, 7}, 100, 10, kTanh, Residual::self, Scale::channel, true, true, false, 0.1, 5},
    {{1, 2, 67},
     64,
     48,
     kSilu,
     Residual::other,
     Scale::learnable,
     false,
     false,
     false,
     0.9,
     1,
     true},
    {{1, 1, 65}, 768, 64, kRelu, Residual::self, Scale::number, true, false, false, 0},
    {{1, 1, 197},
     192,
     8,
     kGelu,
     Residual::self,
     Scale::number,
     true,
     true,
     true,
     0,
     0,
     false,
     true},
    {{2, 1, 99}, 257, 1, kQuick, Residual::none, Scale::channel, true, true, true, 0.5, 2},
    {{1, 1, 33},
     1024,
     256,
     kGelu,
     Residual::other,
     Scale::learnable,
     true,
     false,
     false,
     0.2,
     0,
     true},
    {{1, 1, 40}, 31, 100, kIdentity, Residual::self, Scale::number, false, false, false, 1.0},
};

double normal_cdf(double z) { return 0.5 * std::erfc(-z * std::sqrt(0.5)); }
double logistic(double z) { return 1 / (1 + std::exp(-z)); }

// The activation and its derivative.
std::pair<double, double> activate(Activation activation, double z) {
  switch (activation) {
    case Activation::identity:
      return {z, 1};
    case Activation::relu:
      return {z > 0 ? z : 0, z > 0};
    case Activation::gelu:
      return {z * normal_cdf(z), normal_cdf(z) + z * std::exp(-z * z / 2) / std::sqrt(2 * M_PI)};
    case Activation::gelu_tanh: {
      double k = std::sqrt(2 / M_PI), t = std::tanh(k * (z + 0.044715 * z * z * z));
      return {z * (1 + t) / 2, (1 + t) / 2 + z * (1 - t * t) / 2 * k * (1 + 3 * 0.044715 * z * z)};
    }
    case Activation::silu: {
      double s = logistic(z);
      return {z * s, s + z * s * (1 - s)};
    }
    case Activation::quick_gelu: {
      double s = logistic(1.702 * z);
      return {z * s, s + 1.702 * z * s * (1 - s)};
    }
  }
  return {kNaN, kNaN};
}

constexpr int kOutputs = 9;
constexpr const char* kNames[kOutputs] = {
    "y",           "dx",        "d_down_weight", "d_down_bias",
    "d_up_weight", "d_up_bias", "d_norm_weight", "d_norm_bias",
    "d_scale"};

struct Inputs {
  Values x, residual, dy, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, scale;
  double scale_value = 0.7, norm_eps = 1e-5;
  int64_t seed[2] = {0x123456789abcdef, 0x7fedcba987654321};
};

struct Exact {
  double round(double v) const { return v; }
  double add(double a, double b) const { return a + b; }
};

// What PyTorch does in a dtype: results are rounded to it, sums are kept in float32.
struct Rounded {
  const Format& format;
  double round(double v) const { return nearest(v, format); }
  double add(double a, double b) const { return float(a + b); }
};

// Forward and backward by the definition.
template <class Arithmetic>
std::vector<Values> naive(const Case& c, const Inputs& in, const Arithmetic& math) {
  const int64_t m = c.rows[0] * c.rows[1] * c.rows[2], d = c.dim, r = c.bottleneck;
  auto zeros = [](int64_t n) { return Values(size_t(n), 0.0); };
  std::vector<Values> out = {zeros(m * d), zeros(m * d), zeros(r * d),
                             zeros(r),     zeros(d * r), zeros(d),
                             zeros(d),     zeros(d),     zeros(c.scale == Scale::channel ? d : 1)};
  Values &y = out[0], &dx = out[1], &d_down = out[2], &d_down_bias = out[3], &d_up = out[4];
  Values &d_up_bias = out[5], &d_norm = out[6], &d_norm_bias = out[7], &d_scale = out[8];
  const double kept = c.dropout < 1 ? 1 / (1 - c.dropout) : 0;
  const uint32_t threshold = dropout_threshold(c.dropout);

  for (int64_t row = 0; row < m; ++row) {
    const double* x = &in.x[size_t(row * d)];
    const double* dy = &in.dy[size_t(row * d)];
    Values normal(x, x + d), hat(x, x + d), h(static_cast<size_t>(r)), slope(h), dz(h),
        dnormal(normal);
    double rstd = 1;
    if (c.norm) {
      double mean = 0, variance = 0;
      for (int64_t i = 0; i < d; ++i) mean = math.add(mean, x[i] / double(d));
      for (int64_t i = 0; i < d; ++i)
        variance = math.add(variance, (x[i] - mean) * (x[i] - mean) / double(d));
      rstd = 1 / std::sqrt(variance + in.norm_eps);
      for (int64_t i = 0; i < d; ++i) {
        hat[i] = (x[i] - mean) * rstd;
        normal[i] = math.round(hat[i] * in.norm_weight[i] + (c.norm_bias ? in.norm_bias[i] : 0));
      }
    }
    for (int64_t j = 0; j < r; ++j) {
      double z = c.bias ? in.down_bias[j] : 0;
      for (int64_t i = 0; i < d; ++i) z = math.add(z, normal[i] * in.down_weight[j * d + i]);
      auto [value, derivative] = activate(c.activation, math.round(z));
      double mask = 1;
      if (c.dropout > 0) {
        PhiloxBlock block = philox4x32(uint64_t(in.seed[0]), uint64_t(row * ((r + 3) / 4) + j / 4),
                                       uint64_t(in.seed[1]));
        mask = block.lane[j % 4] < threshold ? 0 : kept;
      }
      h[j] = math.round(math.round(value) * mask);
      slope[j] = derivative * mask;
    }
    Values du(static_cast<size_t>(d));
    for (int64_t i = 0; i < d; ++i) {
      double u = c.bias ? in.up_bias[i] : 0;
      for (int64_t j = 0; j < r; ++j) u = math.add(u, h[j] * in.up_weight[i * r + j]);
      u = math.round(u);
      double s =
          c.scale == Scale::number ? in.scale_value : in.scale[c.scale == Scale::channel ? i : 0];
      double residual = c.residual == Residual::none   ? 0
                        : c.residual == Residual::self ? x[i]
                                                       : in.residual[size_t(row * d + i)];
      y[size_t(row * d + i)] = math.round(residual + math.round(s * u));
      du[i] = math.round(s * dy[i]);
      double& ds = d_scale[c.scale == Scale::channel ? i : 0];
      ds = math.add(ds, math.round(dy[i] * u));
      d_up_bias[i] = math.add(d_up_bias[i], du[i]);
      for (int64_t j = 0; j < r; ++j) d_up[i * r + j] = math.add(d_up[i * r + j], du[i] * h[j]);
    }
    for (int64_t j = 0; j < r; ++j) {
      double dh = 0;
      for (int64_t i = 0; i < d; ++i) dh = math.add(dh, du[i] * in.up_weight[i * r + j]);
      dz[j] = math.round(math.round(dh) * slope[j]);
      d_down_bias[j] = math.add(d_down_bias[j], dz[j]);
      for (int64_t i = 0; i < d; ++i)
        d_down[j * d + i] = math.add(d_down[j * d + i], dz[j] * normal[i]);
    }
    double mean = 0, projection = 0;
    for (int64_t i = 0; i < d; ++i) {
      double g = 0;
      for (int64_t j = 0; j < r; ++j) g = math.add(g, dz[j] * in.down_weight[j * d + i]);
      dnormal[i] = g = math.round(g);
      if (!c.norm) continue;
      d_norm[i] = math.add(d_norm[i], g * hat[i]);
      d_norm_bias[i] = math.add(d_norm_bias[i], g);
      mean = math.add(mean, g * in.norm_weight[i] / double(d));
      projection = math.add(projection, g * in.norm_weight[i] * hat[i] / double(d));
    }
    for (int64_t i = 0; i < d; ++i) {
      double g =
          c.norm ? math.round(rstd * (dnormal[i] * in.norm_weight[i] - mean - hat[i] * projection))
                 : dnormal[i];
      dx[size_t(row * d + i)] = math.round(g + (c.residual == Residual::self ? dy[i] : 0));
    }
  }
  for (Values& values : out)
    for (double& v : values) v = math.round(v);
  return out;
}

double greatest(const Values& values) {
  double m = 0;
  for (double v : values) m = std::max(m, std::fabs(v));
  return m;
}

double rms(const Values& values) {
  double sum = 0;
  for (double v : values) sum += v * v;
  return std::sqrt(sum / double(std::max<size_t>(values.size(), 1)));
}

Values operator-(Values a, const Values& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] -= b[i];
  return a;
}

// Output i of `out` is as close to gold as tests/compare.py demands; if not, a sentence about it.
std::string difference(const std::vector<Values>& out, const std::vector<Values>& gold,
                       const std::vector<std::vector<Values>>& bases, double eps, int i) {
  for (double v : out[i])
    if (!std::isfinite(v)) return "not finite";
  double limit = 0, rms_limit = 0;
  for (const std::vector<Values>& base : bases) {
    limit = std::max(limit, 2 * greatest(base[i] - gold[i]));
    rms_limit = std::max(rms_limit, 1.5 * rms(base[i] - gold[i]));
  }
  limit += 2 * eps * greatest(gold[i]);
  rms_limit += eps * rms(gold[i]);
  const Values error = out[i] - gold[i];
  if (greatest(error) <= limit && rms(error) <= rms_limit) return "";
  std::ostringstream text;
  text << "max error " << greatest(error) << " (limit " << limit << "), rms " << rms(error)
       << " (limit " << rms_limit << ")";
  return text.str();
}

template <int count>
cpu::Threads threads() {
  return {count, [](int64_t n, void (*body)(int64_t, void*), void* context) {
            std::vector<std::thread> workers;
            for (int64_t t = 0; t < count; ++t)
              workers.emplace_back([=] {
                for (int64_t i = t; i < n; i += count) body(i, context);
              });
            for (std::thread& worker : workers) worker.join();
          }};
}

// One forward and one backward pass of the kernels in use; outputs not in `wanted` stay NaN.
std::vector<Values> run(const Case& c, const Inputs& in, Dtype dtype, const cpu::Threads& threads,
                        unsigned wanted) {
  const int64_t m = c.rows[0] * c.rows[1] * c.rows[2], d = c.dim, r = c.bottleneck;
  const Dtype own = c.float_parameters ? Dtype::float32 : dtype;
  auto matrix = [&](const Values& values, bool broadcast = false) {
    Array array(dtype, c.rows, d, c.gap, broadcast);
    if (!values.empty()) array.fill(values);
    return array;
  };
  auto parameter = [&](int64_t n, const Values& values) {
    Array array(own, {1, 1, 1}, n, 0);
    if (!values.empty()) array.fill(values);
    return array;
  };
  const int64_t scales = c.scale == Scale::channel ? d : 1;
  Array x = matrix(in.x), residual = matrix(in.residual), dy = matrix(in.dy, c.broadcast_dy);
  Array down = parameter(r * d, in.down_weight), down_bias = parameter(r, in.down_bias);
  Array up = parameter(d * r, in.up_weight), up_bias = parameter(d, in.up_bias);
  Array norm = parameter(d, in.norm_weight), norm_bias = parameter(d, in.norm_bias);
  Array scale = parameter(scales, in.scale);
  Array y = matrix({}), dx = matrix({}), d_down = parameter(r * d, {}),
        d_down_bias = parameter(r, {});
  Array d_up = parameter(d * r, {}), d_up_bias = parameter(d, {}), d_norm = parameter(d, {});
  Array d_norm_bias = parameter(d, {}), d_scale = parameter(scales, {});
  Array z(dtype, {1, 1, m}, r, 0), stats(Dtype::float32, {1, 1, m}, 2, 0);

  Bottleneck p;
  p.dtype = dtype;
  std::copy(c.rows, c.rows + 3, p.rows);
  p.dim = d;
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
  if (c.dropout > 0) p.seed = in.seed;
  p.dropout = c.dropout;
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
  cpu::bottleneck_backward(backward, threads);

  std::vector<Values> out = {y.read(), dx.read()};
  for (Array* gradient : gradients) out.push_back(gradient->read());
  return out;
}

// Equal, unwritten outputs (NaN) included.
bool same_bits(const std::vector<Values>& a, const std::vector<Values>& b) {
  auto same = [](double x, double y) { return x == y || (std::isnan(x) && std::isnan(y)); };
  for (size_t i = 0; i < a.size(); ++i)
    if (!std::equal(a[i].begin(), a[i].end(), b[i].begin(), same)) return false;
  return true;
}

int check(const Case& c, int index, Dtype dtype, const std::vector<std::string>& isas) {
  const int64_t m = c.rows[0] * c.rows[1] * c.rows[2], d = c.dim, r = c.bottleneck;
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
  in.residual = draw(m * d, 1);
  in.dy = draw(m * d, 1);
  if (c.broadcast_dy)
    for (int64_t i = 0; i < m * d; ++i) in.dy[size_t(i)] = in.dy[size_t(i % d)];
  in.down_weight = draw(r * d, 1 / std::sqrt(double(d)));
  in.down_bias = draw(r, 0.5);
  in.up_weight = draw(d * r, 1 / std::sqrt(double(r)));
  in.up_bias = draw(d, 0.5);
  in.norm_weight = draw(d, 0.5, 1);
  in.norm_bias = draw(d, 0.5);
  in.scale = draw(c.scale == Scale::channel ? d : 1, 1);

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
  std::vector<std::string> isas;
  std::istringstream names(fastadapters_cpu_isas());
  for (std::string name; std::getline(names, name, ',');) isas.push_back(name);

  int failures = 0, index = 0;
  for (const Case& c : kCases) {
    for (Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16})
      failures += check(c, index, dtype, isas);
    ++index;
  }
  if (fastadapters_set_cpu_isa("no such set")) {
    std::puts("an unknown instruction set was accepted");
    ++failures;
  }
  std::printf("%d cases x 3 dtypes on %s: %d failures\n", index, fastadapters_cpu_isas(), failures);
  return failures != 0;
}

}  // namespace
}  // namespace fastadapters

int main() { return fastadapters::main(); }

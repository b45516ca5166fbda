// Arrays of every dtype in exactly their memory, and the rule they are compared by.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "cpu/threads.h"
#include "tensors.h"

namespace fastadapters {
namespace {

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

// Equal, unwritten outputs (NaN) included.
bool same_bits(const std::vector<Values>& a, const std::vector<Values>& b) {
  auto same = [](double x, double y) { return x == y || (std::isnan(x) && std::isnan(y)); };
  for (size_t i = 0; i < a.size(); ++i)
    if (!std::equal(a[i].begin(), a[i].end(), b[i].begin(), same)) return false;
  return true;
}

// Failures of check(sample, its index, dtype, instruction sets) over samples and dtypes, printed.
template <class Sample, size_t n, class Check>
int check_samples(const Sample (&samples)[n], Check check) {
  std::vector<std::string> isas;
  std::istringstream names(fastadapters_cpu_isas());
  for (std::string name; std::getline(names, name, ',');) isas.push_back(name);
  int failures = 0, index = 0;
  for (const Sample& sample : samples) {
    for (Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16})
      failures += check(sample, index, dtype, isas);
    ++index;
  }
  std::printf("%d samples x 3 dtypes on %s: %d failures\n", index, fastadapters_cpu_isas(),
              failures);
  return failures;
}

}  // namespace
}  // namespace fastadapters

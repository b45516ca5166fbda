// The activations and their derivatives in double precision.
#pragma once

#include <cmath>
#include <utility>

#include "arrays.h"

namespace fastadapters {
namespace {

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

}  // namespace
}  // namespace fastadapters

// Activations and their derivatives on the accumulators of a tile.
#pragma once

#include "../tensors.h"

namespace fastadapters::cuda {

// value = activation(z); in backward also gradient *= its derivative, of which relu's selects.
template <bool kBackward, int kN>
__device__ __forceinline__ void activate(Activation activation, const float (&z)[2][kN][4],
                                         float (&value)[2][kN][4], float (&gradient)[2][kN][4]) {
  const auto each = [&](auto function) {  // returns the value and the derivative
#pragma unroll
    for (int i = 0; i < 8 * kN; ++i) {
      const float2 result = function((&z[0][0][0])[i]);
      (&value[0][0][0])[i] = result.x;
      if constexpr (kBackward) (&gradient[0][0][0])[i] *= result.y;
    }
  };
  // z times a sigmoid of z (a + b z^2)
  const auto gated = [&](float a, float b) {
    each([=](float z) -> float2 {
      const float gate = 1 / (1 + expf(-z * (a + b * z * z)));
      // Far out the gate is 0 or 1, and z^2 may be infinite.
      const float slope = z * gate * (1 - gate) * (a + 3 * b * z * z);
      return {z * gate, fabsf(z) < 128 ? gate + slope : gate};
    });
  };
  switch (activation) {
    case Activation::identity:
      return each([](float z) -> float2 { return {z, 1}; });
    case Activation::relu:
#pragma unroll
      for (int i = 0; i < 8 * kN; ++i) {
        const float at = (&z[0][0][0])[i];
        (&value[0][0][0])[i] = at < 0 ? 0 : at;
        if (kBackward && !(at > 0)) (&gradient[0][0][0])[i] = 0;
      }
      return;
    case Activation::gelu:
      return each([](float z) -> float2 {
        const float cdf = 0.5f + 0.5f * erff(0.707106781f * z);
        return {z * cdf, cdf + z * 0.398942280f * expf(-0.5f * z * z)};
      });
    default:
      return gated(activation == Activation::silu         ? 1.0f
                   : activation == Activation::quick_gelu ? 1.702f
                                                          : 1.59576912f,
                   activation == Activation::gelu_tanh ? 0.0713548162f : 0.0f);
  }
}

}  // namespace fastadapters::cuda

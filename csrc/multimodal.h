// Arguments of the multi-modal adapter's head on raw pointers, shared by the CPU and the CUDA
// backend: from text [C, D] and image [B, D] features to logits [B, C].
//
//     new(f) = unit(blend * unit(adapter(f)) + (1 - blend) * unit(f))
//     logits = scale * new(image) . new(text)
//
// The adapter is down-sampler, attention over [texts ; image] of each item, up-sampler. Everything
// is computed in fp32 from the values as they are stored.
#pragma once

#include "tensors.h"

namespace fastadapters {

enum class Adapt : int32_t { both, text, image };

// [rows, D] with rows `stride` elements apart.
struct Features {
  void* data = nullptr;
  int64_t stride = 0;
  Dtype dtype = Dtype::float32;
};

// Weights [out, in] and biases [out], or their gradients, of which those not asked for are absent.
struct MultimodalParameters {
  Parameter down_weight, down_bias;      // D -> E, or D -> down_hidden
  Parameter down_weight_2, down_bias_2;  // down_hidden -> E, or absent
  Parameter in_weight, in_bias;          // E -> 3 E: queries, keys, values
  Parameter out_weight, out_bias;        // E -> E
  Parameter up_weight, up_bias;          // E -> D, or E -> up_hidden
  Parameter up_weight_2, up_bias_2;      // up_hidden -> D behind a GELU, or absent
  Parameter blend, logit_scale;          // [1], or absent: blend_value, scale_value
};

struct Multimodal {
  int64_t texts = 0;                       // C >= 1
  int64_t items = 0;                       // B >= 0
  int64_t dim = 0;                         // D
  int64_t width = 0;                       // E, of the attention
  int64_t heads = 0;                       // a divisor of E
  int64_t down_hidden = 0, up_hidden = 0;  // 0 where there is one layer
  Features text, image;                    // [C, D], [B, D]
  MultimodalParameters parameters;
  float blend_value = 0, rest_value = 1, scale_value = 1;  // rest: 1 - blend, rounded once
  // Added to the scores of text and image queries (rows) with text and image keys; -inf blocks.
  float bias[2][2] = {};
  Adapt adapt = Adapt::both;  // with `image`, image features are blended as they come
  Activation down_activation = Activation::identity;  // between two down-sampling layers
  Dtype out_dtype = Dtype::float32;                   // of the logits and of their gradient
  float* state = nullptr;  // what backward reuses, laid out as the backend likes
};

struct MultimodalForward : Multimodal {
  void* logits = nullptr;  // [B, C], contiguous; state may be absent
};

struct MultimodalBackward : Multimodal {
  const void* d_logits = nullptr;  // [B, C], contiguous
  Features d_text, d_image;        // contiguous, in the dtype of the features
  MultimodalParameters gradients;
};

}  // namespace fastadapters

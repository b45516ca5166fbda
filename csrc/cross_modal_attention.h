// Arguments of cross-modal attention on raw pointers, shared by the CPU and the CUDA backend.
//
//     score(q, k) = q.k * scale + bias[modality of q][modality of k]
//
// The sequence of an item is its C text tokens and its I image tokens.
#pragma once

#include "tensors.h"

namespace fastadapters {

// [items, tokens, H, d]; strides in elements, that of d is 1. A null `data` means "absent".
struct Heads {
  void* data = nullptr;
  int64_t item = 0, token = 0, head = 0;  // item: 0 where all items share the tokens
};

struct Attended {
  Heads q, k, v;
};

struct CrossModalAttention {
  Dtype dtype = Dtype::float32;  // of all tensors; sums and softmax are in fp32
  int64_t items = 0;             // B >= 0
  int64_t texts = 0;             // C >= 1
  int64_t images = 0;            // I >= 1
  int64_t heads = 0;             // H
  int64_t width = 0;             // d
  bool shared = false;           // whether all items have the same texts, [C, H, d]
  Attended text, image;
  float scale = 1;
  float bias[2][2] = {};   // of text and image queries (rows) with text and image keys; -inf blocks
  float* state = nullptr;  // what backward reuses, laid out as the backend likes
};

struct CrossModalAttentionForward : CrossModalAttention {
  Heads text_out, image_out;  // [B, C, H, d], [B, I, H, d]; what is absent is not asked for
};

struct CrossModalAttentionBackward : CrossModalAttention {
  Heads d_text_out, d_image_out;  // absent: zero
  Attended d_text, d_image;       // contiguous, [C, H, d] where shared; absent: not asked for
};

}  // namespace fastadapters

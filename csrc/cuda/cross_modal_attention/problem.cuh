// What every kernel of cross-modal attention is told, and how it finds rows of tokens.
//
// What shares texts is a group: all items where they share the texts, else each item. Rows of a
// group are its tokens of one modality, those of all its items one after another.
#pragma once

#include "../../cross_modal_attention.h"
#include "../launch.cuh"
#include "../tile.cuh"

namespace fastadapters::cuda::attention {

constexpr int kText = 0, kImage = 1;

// Floats of the state, in this order: the results of text and image queries, on 16 bytes, and their
// softmax.
struct StateSizes {
  int64_t out[2], softmax[2];
  explicit StateSizes(const CrossModalAttention& op) {
    const int64_t text = (op.shared ? 1 : op.items) * op.texts * op.heads;
    const int64_t image = op.items * op.images * op.heads;
    out[kText] = round_up(text * op.width, 4), softmax[kText] = 2 * text;
    out[kImage] = round_up(image * op.width, 4), softmax[kImage] = 2 * image;
  }
  int64_t total() const { return out[kText] + out[kImage] + softmax[kText] + softmax[kImage]; }
};

// [groups * items, tokens, H, d]; strides in bytes. No `data`: absent.
struct Tokens {
  char* data = nullptr;
  int64_t item = 0, token = 0, head = 0;
  int tokens = 1, items = 1;  // of an item, of a group
  bool aligned = false;       // every row starts on 16 bytes
};

// Arrays are by modality. Numbers of a query come head by head: [groups, H, rows].
struct Problem {
  int groups = 0, items = 0, heads = 0, width = 0, images = 0;  // items: of a group
  int rows[2] = {};                                             // of a group
  float scale = 1;       // of a score, times log2(e): weights are powers of 2
  bool sees[2][2] = {};  // queries (rows) see keys
  float add[2][2] = {};  // to such scores; never above 0, so that the greater ones stay exact
  bool single[2] = {};   // whether a query sees one key in all, so that its score does not matter
  Tokens q[2], k[2], v[2];
  float* out[2] = {};       // [groups, rows, H, d], of text queries over the texts alone; may be
  float2* softmax[2] = {};  // absent, as may be: the greatest score, 1 / sum of all weights to it
};

__device__ __forceinline__ char* row_of(const Tokens& t, int group, int head, int row) {
  int item = row, token = 0;
  if (t.tokens != 1) {
    item = row < t.tokens ? 0 : row / t.tokens;
    token = row - item * t.tokens;
  }
  return t.data + (int64_t(group) * t.items + item) * t.item + token * t.token + head * t.head;
}

// Where the numbers of a group's queries of one head begin.
__device__ __forceinline__ int64_t numbers_of(const Problem& p, int modality, int group, int head) {
  return (int64_t(group) * p.heads + head) * p.rows[modality];
}

// Where a row [d] in fp32 begins.
__device__ __forceinline__ int64_t values_of(const Problem& p, int modality, int group, int head,
                                             int row) {
  return ((int64_t(group) * p.rows[modality] + row) * p.heads + head) * p.width;
}

// (score - top) as a weight; nothing is at -inf where that is the greatest score, too.
__device__ __forceinline__ float power(float score, float top) {
  return exp2f(score - (top == -INFINITY ? 0 : top));
}

}  // namespace fastadapters::cuda::attention

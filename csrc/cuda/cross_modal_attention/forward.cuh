// Attention of the text queries over the texts, whatever the item, and of the image queries of all
// items over the texts and their own images.
#pragma once

#include "walk.cuh"

namespace fastadapters::cuda::attention {

struct Forward : Problem {
  int tiles[2] = {};  // of a group
  Tokens image_out;
};

template <class E, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) attend(const __grid_constant__ Forward p) {
  using L = Layout<E, kWidth, 1>;
  extern __shared__ __align__(128) char shared[];
  const int head = blockIdx.x % p.heads, block = blockIdx.x / p.heads;
  const int modality = block < p.groups * p.tiles[kText] ? kText : kImage;
  const int tile = block - (modality ? p.groups * p.tiles[kText] : 0);
  const int group = tile / p.tiles[modality], first = tile % p.tiles[modality] * kRows;
  Walk<L::kOther> walk;
  if (p.sees[modality][kText]) walk.texts = p.rows[kText];
  if (modality == kImage && p.sees[kImage][kImage]) add_own_items(&walk, p, first);

  if (walk.steps() > 0)
    bring<L, kRows>(shared, p.q[modality], group, head, first, p.rows[modality], p.width);
  const int row = first + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  Sums<L> sums = {};
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {};
  walk_over<L>(
      walk, shared + L::kFirstStage,
      [&](char* stage, int keys, int begin) {
        bring<L, L::kOther>(stage, p.k[keys], group, head, begin, walk.last(keys), p.width);
        bring<L, L::kOther>(stage + L::kOtherOperand, p.v[keys], group, head, begin,
                            walk.last(keys), p.width);
      },
      [&](const char* stage, int keys, int begin) {
        Scores<L> scores = {};
        multiply_rows<E, L>(scores, shared, stage);
        const bool own_item = modality == kImage && keys == kImage;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int2 met = met_by(walk, keys, own_item, p.images, row + 8 * half);
          float highest = top[half];
          each_score<L>(scores, half, begin, [&](float& score, int column) {
            score = met.x <= column && column < met.y ? fmaf(score, p.scale, p.add[modality][keys])
                                                      : -INFINITY;
            highest = fmaxf(highest, score);
          });
          highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 1));
          highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 2));
          const float keep = power(top[half], highest);
          float sum = 0;
          each_score<L>(scores, half, begin,
                        [&](float& score, int) { sum += score = power(score, highest); });
          total[half] = fmaf(total[half], keep, sum);
          top[half] = highest;
          each_pair<L>(sums, [&](int i, int, int, float* pair) {
            if (i == half) pair[0] *= keep, pair[1] *= keep;
          });
        }
        put_weights<E, L>(shared + L::kWeights, scores);
        __syncwarp();
        average<E, L>(sums, shared + L::kWeights, stage + L::kOtherOperand);
      });

  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] += __shfl_xor_sync(0xffffffff, total[half], 1);
    total[half] += __shfl_xor_sync(0xffffffff, total[half], 2);
    factor[half] = total[half] > 0 ? 1 / total[half] : 0;
    if (p.softmax[modality] && threadIdx.x % 4 == 0 && row + 8 * half < p.rows[modality]) {
      p.softmax[modality][numbers_of(p, modality, group, head) + row + 8 * half] = {top[half],
                                                                                    factor[half]};
    }
  }
  each_pair<L>(sums, [&](int half, int at, int column, float* pair) {
    pair[0] *= factor[half], pair[1] *= factor[half];
    if (!p.out[modality] || first + at >= p.rows[modality]) return;
    store_two(p.out[modality] + values_of(p, modality, group, head, first + at), column, p.width,
              pair);
  });
  if (modality == kImage && p.image_out.data) {
    store_rows<E, L>(shared, sums, p.image_out, group, head, first, p.rows[kImage], p.width);
  }
}

}  // namespace fastadapters::cuda::attention

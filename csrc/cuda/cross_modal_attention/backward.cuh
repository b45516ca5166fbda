// Backward of the attention over texts, and of image queries over their own images. Weights are
// computed again:
//
//     delta = d_out . out                     d_score = weight * (d_out . v - delta)
//     dq = d_score k      dk = d_score^T q    dv = weight^T d_out
//
// The sum of the d_scores of a text query over all items is that of d_texts, the sum of w d_out,
// and of the sum of w delta, where w is the share of the texts.
#pragma once

#include "columns.cuh"
#include "walk.cuh"

namespace fastadapters::cuda::attention {

struct Backward : Problem {
  Tokens d_out[2];       // of text queries: d_texts
  float* delta[2] = {};  // [groups, H, rows]; absent: these queries have no gradient
  Tokens dq[2], dk[2], dv[2];
  int tiles[2][2] = {};      // of a group: by modality, of queries and of keys
  float gradient_scale = 1;  // of dq and dk
  // Slabs to be added: of the queries of texts, of the keys and values of images.
  const float *dq_slabs = nullptr, *dk_slabs = nullptr, *dv_slabs = nullptr;
  int splits = 0, text_tiles = 0;
};

// What `text_images` leaves of the texts, and whereto: rounded, d_out[kText] and delta[kText].
struct Prepare : Backward {
  const float *d_texts = nullptr, *d_delta = nullptr;
};

// delta of all queries, and d_texts. A few lanes have a row.
template <class E, int kWidth>
__global__ void __launch_bounds__(kRowThreads) prepare(const __grid_constant__ Prepare p) {
  using C = Columns<E, kWidth>;
  int64_t at = int64_t(blockIdx.x) * C::kRowsOfBlock + threadIdx.x / C::kLanes;
  const int64_t texts = p.delta[kText] ? int64_t(p.groups) * p.rows[kText] * p.heads : 0;
  const int64_t all = texts + (p.delta[kImage] ? int64_t(p.groups) * p.rows[kImage] * p.heads : 0);
  const bool there = at < all;
  at = min(at, all - 1);
  const int modality = at < texts ? kText : kImage;
  if (modality == kImage) at -= texts;
  const int head = int(at % p.heads);
  const int row = int(at / p.heads % p.rows[modality]),
            group = int(at / p.heads / p.rows[modality]);
  const int64_t number = numbers_of(p, modality, group, head) + row;
  const int64_t values = values_of(p, modality, group, head, row);
  const bool aligned = p.width % 4 == 0;

  C out, d_out;
  out.template load<Full>(p.out[modality] + values, p.width, aligned);
  char* const d_row = row_of(p.d_out[modality], group, head, row);
  float delta = 0;
  if (modality == kImage) {
    d_out.template load<E>(d_row, p.width, p.d_out[kImage].aligned);
  } else {
    const int64_t slab = texts;
    C sum, part;
#pragma unroll 2
    for (int split = 0; split < p.splits; ++split) {
      part.template load<Full>(p.d_texts + split * slab * p.width + values, p.width, aligned);
      sum.each([](float& total, float v) { total += v; }, part);
      delta += p.d_delta[split * slab + number];
    }
    // delta is that of the rounded d_texts.
    d_out.each([](float& lost, float v) { lost = E::round(v) - v; }, sum);
    if (there) sum.template store<E>(d_row, p.width, p.d_out[kText].aligned);
  }
  delta += d_out.dot(out);
  if (there && threadIdx.x % C::kLanes == 0) p.delta[modality][number] = delta;
}

// sums[row, columns] += a slab's, for all of them in order.
template <class L>
__device__ __forceinline__ void add_slabs(Sums<L>& sums, const Problem& p, const float* slabs,
                                          int count, int modality, int group, int head, int first) {
  const int64_t slab = int64_t(p.groups) * p.rows[modality] * p.heads * p.width;
  each_pair<L>(sums, [&](int, int row, int column, float* pair) {
    if (first + row >= p.rows[modality]) return;
    const float* from = slabs + values_of(p, modality, group, head, first + row) + column;
    for (int i = 0; i < count; ++i, from += slab) {
      if (column < p.width) pair[0] += from[0];
      if (column + 1 < p.width) pair[1] += from[1];
    }
  });
}

// kKeysOwn: a block has keys and values, and walks over the queries that see them; else it has
// queries.
template <class E, int kWidth, bool kKeysOwn>
__device__ __forceinline__ void attend_backward_rows(const Backward& p, char* shared, int modality,
                                                     int group, int head, int first) {
  using L = Layout<E, kWidth, 2>;
  constexpr int kGradients = kKeysOwn ? 2 : 1;
  const Tokens* const own[2] = {kKeysOwn ? p.k : p.q, kKeysOwn ? p.v : p.d_out};
  const Tokens* const other[2] = {kKeysOwn ? p.q : p.k, kKeysOwn ? p.d_out : p.v};
  const auto meets = [&](int with) {
    const int queries = kKeysOwn ? with : modality, keys = kKeysOwn ? modality : with;
    if (queries == kText && keys == kImage) return false;  // `text_images` has done it
    return p.delta[queries] && p.sees[queries][keys] && (kKeysOwn || !p.single[queries]);
  };
  Walk<L::kOther> walk;
  if (meets(kText)) walk.texts = p.rows[kText];
  if (meets(kImage) && modality == kText) walk.end = p.rows[kImage];
  if (meets(kImage) && modality == kImage) add_own_items(&walk, p, first);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (walk.steps() == 0) break;
    bring<L, kRows>(shared + i * L::kOwn, own[i][modality], group, head, first, p.rows[modality],
                    p.width);
  }

  const int row = first + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  float2 own_softmax[2] = {};
  float own_delta[2] = {};
  if constexpr (!kKeysOwn) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (walk.steps() == 0 || row + 8 * half >= p.rows[modality]) continue;
      const int64_t number = numbers_of(p, modality, group, head) + row + 8 * half;
      own_softmax[half] = p.softmax[modality][number];
      own_delta[half] = p.delta[modality][number];
    }
  }
  // Bits of one register: pointers would be kept in four.
  const int wanted = kKeysOwn ? (p.dk[modality].data ? 1 : 0) + (p.dv[modality].data ? 2 : 0) : 1;
  const bool wants_keys = wanted & 1, wants_values = wanted & 2;
  Sums<L> sums[kGradients] = {};
  walk_over<L>(
      walk, shared + L::kFirstStage,
      [&](char* stage, int with, int begin) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          bring<L, L::kOther>(stage + i * L::kOtherOperand, other[i][with], group, head, begin,
                              walk.last(with), p.width);
        }
      },
      [&](const char* stage, int with, int begin) {
        const int queries = kKeysOwn ? with : modality, keys = kKeysOwn ? modality : with;
        const bool own_item = modality == kImage && with == kImage;
        const bool scored = wants_keys && !p.single[queries];
        const int64_t numbers = kKeysOwn ? numbers_of(p, with, group, head) : 0;
        Scores<L> weights = {}, d_scores = {};
        multiply_rows<E, L>(weights, shared, stage);
        if (scored) multiply_rows<E, L>(d_scores, shared + L::kOwn, stage + L::kOtherOperand);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int2 met = met_by(walk, with, own_item, p.images, row + 8 * half);
#pragma unroll
          for (int i = 0; i < L::kOther / 4; ++i) {
            const int column = begin + i / 2 * 8 + int(threadIdx.x) % 4 * 2 + i % 2;
            float &weight = weights[0][i / 2][2 * half + i % 2],
                  &d_score = d_scores[0][i / 2][2 * half + i % 2];
            if (met.x <= column && column < met.y) {
              const float2 softmax =
                  kKeysOwn ? p.softmax[queries][numbers + column] : own_softmax[half];
              const float delta = kKeysOwn ? p.delta[queries][numbers + column] : own_delta[half];
              weight = softmax.y * exp2f(fmaf(weight, p.scale, p.add[queries][keys] - softmax.x));
              d_score = weight * (d_score - delta);
            } else {
              weight = d_score = 0;
            }
          }
        }
        if (scored) put_weights<E, L>(shared + L::kWeights, d_scores);
        if (wants_values) put_weights<E, L>(shared + L::kWeights + kPanel, weights);
        __syncwarp();
        if (scored) average<E, L>(sums[0], shared + L::kWeights, stage);
        if (wants_values) {
          average<E, L>(sums[kGradients - 1], shared + L::kWeights + kPanel,
                        stage + L::kOtherOperand);
        }
      });

  if constexpr (kKeysOwn) {
    if (modality == kImage && p.dk_slabs) {
      add_slabs<L>(sums[0], p, p.dk_slabs, p.text_tiles, kImage, group, head, first);
    }
    if (modality == kImage && p.dv_slabs) {
      add_slabs<L>(sums[1], p, p.dv_slabs, p.text_tiles, kImage, group, head, first);
    }
  } else if (modality == kText && p.dq_slabs) {
    add_slabs<L>(sums[0], p, p.dq_slabs, p.splits, kText, group, head, first);
  }
  each_pair<L>(sums[0], [&](int, int, int, float* pair) {
    pair[0] *= p.gradient_scale, pair[1] *= p.gradient_scale;
  });
  if (wants_keys) {
    store_rows<E, L>(shared, sums[0], (kKeysOwn ? p.dk : p.dq)[modality], group, head, first,
                     p.rows[modality], p.width);
  }
  if (wants_values) {
    store_rows<E, L>(shared + L::kOwn, sums[kGradients - 1], p.dv[modality], group, head, first,
                     p.rows[modality], p.width);
  }
}

template <class E, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) attend_backward(const __grid_constant__ Backward p) {
  extern __shared__ __align__(128) char shared[];
  const int head = blockIdx.x % p.heads;
  int tile = blockIdx.x / p.heads, kind = 0;
  // Keys of texts, of images, queries of texts, of images.
  while (tile >= p.groups * p.tiles[kind % 2][kind < 2]) {
    tile -= p.groups * p.tiles[kind % 2][kind < 2];
    ++kind;
  }
  const int modality = kind % 2, tiles = p.tiles[modality][kind < 2];
  const int group = tile / tiles, first = tile % tiles * kRows;
  if (kind < 2) {
    attend_backward_rows<E, kWidth, true>(p, shared, modality, group, head, first);
  } else {
    attend_backward_rows<E, kWidth, false>(p, shared, modality, group, head, first);
  }
}

}  // namespace fastadapters::cuda::attention

// The kernel that computes y in forward, and dx, h and dz in backward. x and dx are stored as X,
// residual, y and dy as Y: as the products are multiplied, E, or in fp32.
#pragma once

#include "../activation.cuh"
#include "../product.cuh"
#include "accumulate.cuh"
#include "half_rows.cuh"
#include "hidden.cuh"
#include "walk.cuh"

namespace fastadapters::cuda {

template <class E, int kWidth, bool kBackward, bool kAccumulate, class X, class Y, bool kGrouped>
__device__ __forceinline__ void pass_tile(const DataPass& p, int tile, char* shared) {
  using T = typename E::T;
  using Out = std::conditional_t<kBackward, X, Y>;
  using L = Layout<E, kWidth, X, Y>;
  constexpr int kSize = L::kSize, kChunk = L::kChunk;
  constexpr int kDownN = kWidth / 16, kUpN = kChunk / 16;

  const bool norm = !kAccumulate && p.norm, folded = norm && p.down_sums != nullptr;
  const bool expand = p.out.data != nullptr;
  const L layout(p, kBackward && norm && expand);
  char* const weights = shared + p.ring * L::kSlot;
  char* const hidden = shared + layout.hidden;
  char* const extra = shared + layout.extra;
  auto& tables = *reinterpret_cast<typename L::Tables*>(shared + layout.tables);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, pair = lane % 4;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2;
  const Run run = tile_at<kGrouped>(p, tile);
  const int first_row = run.first, rows = run.rows, adapter = run.adapter;
  if (kGrouped && rows == 0) return;
  const int end_row = kGrouped ? first_row + rows : p.rows;
  const auto number_of = [&](int row) { return row_at<kGrouped>(p, row, end_row); };
  const int back_chunks = kBackward ? p.chunks : p.out_chunks;
  const int back_dim = kBackward ? p.dim : p.out_dim;
  // LayerNorm that is not folded has the sums over a row of dx made on a way of their own.
  const int summed_chunks = kBackward && norm && !folded && expand ? back_chunks : 0;

  if (threadIdx.x < kRows) {
    const int i = threadIdx.x, row = number_of(first_row + i);
    tables.x[i] = i < rows ? row_offset(p, p.x, row) : 0;
    tables.tail[i] = i < rows ? row_offset(p, p.tail, row) : 0;
    tables.out[i] = i < rows ? row_offset(p, p.out, row) : 0;
    if (kBackward || (norm && !folded)) {
      tables.stats[i] = i < rows && norm ? p.stats[first_row + i] : float2{0, 0};
    }
    if (kBackward) tables.row_sums[0][i] = tables.row_sums[1][i] = {0, 0};
  }
  __syncthreads();
  if (kGrouped && adapter < 0) {
    return fill_with_nan<Out>(p.out.data, tables.out, expand ? rows : 0, back_dim);
  }
  // From `column` on, of the adapter's `columns`.
  const auto load_own = [&](auto& to, const Vector& v, int column, int columns) {
    load_columns<E>(to, v, adapter * columns + column, (adapter + 1) * columns);
  };
  const auto load_x = [&](char* panels, int chunk) {
    load_chunk<E, X>(panels, rows, chunk, p.dim, p.x.aligned,
                     [&](int i) { return p.x.data + tables.x[i]; });
  };
  const auto load_weights = [&](char* panels, bool up, int part, int chunk) {
    if (up) {
      const int64_t first = int64_t(adapter) * p.out_dim + chunk * kChunk;
      const char* const data = p.up.data + first * p.up.stride + part * kWidth * kSize;
#pragma unroll
      for (int i = 0; i < L::kHiddenPanels; ++i) {
        load_panel<T, kChunk, L::kHiddenLine>(
            panels + i * L::kUp, p.out_dim - chunk * kChunk,
            (p.bottleneck - part * kWidth) * kSize - i * kLine, true,
            [&](int row) { return data + i * kLine + row * p.up.stride; });
      }
    } else {
      const int64_t first = int64_t(adapter) * p.bottleneck + part * kWidth;
      const char* const data = p.down.data + first * p.down.stride + chunk * kLine;
      load_panel<T, kWidth>(panels, p.bottleneck - part * kWidth, p.dim * kSize - chunk * kLine,
                            true, [&](int row) { return data + row * p.down.stride; });
    }
  };

  // Each call brings what one step needs, `lookahead` steps ahead of it.
  Walk next(p);
  const auto load_next = [&] {
    const bool back = next.way == Way::back;
    const int step = back ? next.chunk - summed_chunks : 0;  // before 0 only sums are made
    if (!back || (expand && step < back_chunks)) {
      int chunk = next.chunk;
      if (back) chunk = p.keep_tail ? back_chunks - 1 - step : step < 0 ? chunk : step;
      char* const slot = shared + next.slot * L::kSlot;
      if (next.way == Way::x) {
        load_x(slot, chunk);
      } else if (!back || (p.add_tail && next.part == 0 && step >= (p.keep_tail ? p.ring : 0))) {
        load_chunk<E, Y>(slot, rows, chunk, p.out_dim, p.tail.aligned,
                         [&](int i) { return p.tail.data + tables.tail[i]; });
      }
      if (kBackward && norm && back && next.part == 0) {
        load_x(extra + next.chunk % (p.lookahead + 1) * L::kX, chunk);
      }
      load_weights(weights + next.weights * L::kWeights,
                   next.way == (kBackward ? Way::tail : Way::back), next.part, chunk);
    }
    copy_commit();
    next.advance(p);
  };
  // After it this step's data is there, and the place of the step before may be overwritten.
  const auto begin_step = [&] {
    if (p.lookahead == 1) {
      copy_wait<0>();
    } else {
      copy_wait<kLargestLookahead - 1>();
    }
    __syncthreads();
    load_next();
  };
  for (int i = 0; i < p.lookahead; ++i) load_next();
  // From fp32 the mean (or, before it is known, that of the first chunk) is taken off each row of x
  // before it is multiplied, lest LayerNorm's sums cancel. In 16 bits the products are exact; but a
  // row of equal elements must vanish altogether, so its rstd is stored with a minus.
  constexpr bool kShift = sizeof(typename X::T) == 4;
  float shift[2][2] = {};
  const float no_shift[2][2] = {};
  float2 sums = {0, 0};  // of a half row of x and of its squares, about the mean of the first chunk
  float about = 0;
  const float number = p.scale.data ? load<E>(p.scale, adapter) : p.scale_value;
  const float scale = p.channel_scale ? 1 : number;

  // The four lanes of a row add up what they have for LayerNorm.
  const auto add_to_row = [&](int i, float2 row_sums) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      row_sums.x += __shfl_xor_sync(0xffffffff, row_sums.x, step);
      row_sums.y += __shfl_xor_sync(0xffffffff, row_sums.y, step);
    }
    if (pair == 0) {
      float2& total = tables.row_sums[warp_column][warp_row + 8 * i + group];
      total = {total.x + row_sums.x, total.y + row_sums.y};
    }
  };

  Walk now(p);
  for (int part = 0; part < p.parts; ++part) {
    const Hidden<E, kDownN> at(p.bottleneck, part * kWidth + warp_column * (kWidth / 2) + 2 * pair,
                               first_row + warp_row + group, end_row);
    float z[2][kDownN][4] = {};
    if (kBackward && !norm) at.load(z, p.z);
    for (int chunk = 0; !kAccumulate && p.read_x && chunk < p.chunks; ++chunk) {
      begin_step();
      char* const slot = shared + now.slot * L::kSlot;
      if (p.input_dropout.seed) {
        const int row = threadIdx.x / 2;
        change_half_row<E, X>(slot, [&](auto& v, int at) {
          at += chunk * kChunk;
          if (norm) normalise<E>(p, v, tables.stats[row], at, adapter);
          p.input_dropout.apply(v, number_of(first_row + row), at, p.dim);
        });
        __syncthreads();
      }
      if (folded && part == 0) {
        if constexpr (!kBackward) {
          const int columns = p.dim - chunk * kChunk;
          if (chunk == 0) {
            const char* const first = slot + segment_offset(threadIdx.x / 2, 0);
            about = float(*reinterpret_cast<const typename X::T*>(first));
            const float2 sum = sum_half_row<E, X>(slot, columns, about);
            about += (sum.x + __shfl_xor_sync(0xffffffff, sum.x, 1)) / min(columns, kChunk);
            if constexpr (kShift) {
              if (threadIdx.x % 2 == 0) tables.stats[threadIdx.x / 2].x = about;
              __syncthreads();
            }
          }
          const float2 sum = sum_half_row<E, X>(slot, columns, about);
          sums = {sums.x + sum.x, sums.y + sum.y};
        }
        if (kShift && chunk == 0) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            shift[i / 2][i % 2] = tables.stats[warp_row + 8 * i + group].x;
        }
      }
      multiply<E, 4, false, false, X>(
          z, {slot, kPanel, warp_row},
          {weights + now.weights * L::kWeights, 0, warp_column * (kWidth / 2)}, shift);
      now.advance(p);
    }
    if (!kBackward && folded && part == 0) {
      sums.x += __shfl_xor_sync(0xffffffff, sums.x, 1);
      sums.y += __shfl_xor_sync(0xffffffff, sums.y, 1);
      const float mean = sums.x / p.dim, variance = fmaxf(sums.y / p.dim - mean * mean, 0);
      if constexpr (kShift) __syncthreads();  // the shifts have been read
      if (threadIdx.x % 2 == 0) {
        const int row = threadIdx.x / 2;
        const float rstd = rsqrtf(variance + p.norm_eps);
        tables.stats[row] = {about + mean, kShift || sums.y > 0 ? rstd : -rstd};
        if (p.stats && row < rows) p.stats[first_row + row] = tables.stats[row];
      }
      __syncthreads();
    }

    float bias[kDownN][2], down_sums[kDownN][2];
    load_own(bias, p.down_bias, at.column, p.bottleneck);
    if (folded) {
      load_own(down_sums, {p.down_sums, Dtype::float32, true}, at.column, p.bottleneck);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 stats = tables.stats[warp_row + 8 * i + group];
        const float mean = stats.x - shift[i / 2][i % 2];
#pragma unroll
        for (int j = 0; j < 2 * kDownN; ++j) {
          float& value = z[i / 2][j / 2][i % 2 * 2 + j % 2];
          value = !kShift && stats.y < 0 ? 0 : stats.y * (value - mean * down_sums[j / 2][j % 2]);
        }
      }
    }
    if (!kBackward || norm) {
#pragma unroll
      for (int i = 0; i < 8 * kDownN; ++i)
        z[i / (4 * kDownN)][i / 4 % kDownN][i % 4] += bias[i / 4 % kDownN][i % 2];
    }
    if (!kBackward && p.z && !p.keeps_h) at.store(p.z, z);
    // A relu that was kept is 0 where dropout has been, too, and so is its derivative there.
    const bool told = kBackward && p.keeps_h && p.activation == Activation::relu;
    const uint32_t kept = p.dropout.seed && !told ? at.kept(p.dropout, number_of) : ~0u;
    char* const panels = hidden + part * L::kHiddenPanels * kPanel;
    const Fragment<E> place(warp_row, warp_column * (kWidth / 2), kPanel);
    constexpr int kFirst = L::kBeside ? kWidth : 0;  // column of h where dWu is accumulated
    char* const h_panel = panels + (L::kBeside ? 0 : kPanel);
    const Fragment<E> h_place(warp_row, kFirst + warp_column * (kWidth / 2), kPanel);
    if (!kBackward || kAccumulate || p.hidden) {
      float h[2][kDownN][4];
      activate<false>(p.activation, z, h, h);  // of an h that was kept it is that h
      if (!kBackward || !p.keeps_h) at.mask(h, p.dropout, kept);
      if (!kBackward && p.z && p.keeps_h) at.store(p.z, h);
#pragma unroll
      for (int i = 0; i < 4 * kDownN; ++i) {
        const int n = i % kDownN;
        const float* const value = h[i / kDownN / 2][n] + i / kDownN % 2 * 2;
        if constexpr (kAccumulate) {
          store_pair<E>(h_panel + h_place(i / kDownN, n), value[0], value[1]);
        } else if constexpr (kBackward) {
          at.store_padded(p.hidden, p.width, i / kDownN, n, value[0], value[1]);
        } else {
          store_pair<E>(panels + place(i / kDownN, n), value[0], value[1]);
        }
      }
    }
    if (!kBackward || !p.read_tail) continue;
    float gradient[2][kDownN][4] = {}, unused[2][kDownN][4];
    for (int chunk = 0; chunk < p.out_chunks; ++chunk) {
      begin_step();
      const char* const slot = shared + now.slot * L::kSlot;
      multiply<E, 4, false, true, Y>(
          gradient, {slot, kPanel, warp_row},
          {weights + now.weights * L::kWeights, L::kUp, warp_column * (kWidth / 2)}, no_shift);
      if constexpr (kAccumulate) {
        UpGradient<E, Y>(shared + layout.accumulators, p).add(slot, h_panel, kFirst, chunk);
      }
      now.advance(p);
    }
    activate<true>(p.activation, z, unused, gradient);
    at.mask(gradient, p.dropout, kept);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 row_sums = {0, 0};
#pragma unroll
      for (int n = 0; n < kDownN; ++n) {
        // Rounded before they are summed: what is subtracted from dx must cancel as it should.
        float dz[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          dz[e] = E::round(gradient[i / 2][n][i % 2 * 2 + e] * scale);
          if (folded) {
            row_sums.x += dz[e] * down_sums[n][e];
            row_sums.y += dz[e] * (z[i / 2][n][i % 2 * 2 + e] - bias[n][e]);
          }
        }
        store_pair<E>(panels + place(i, n), dz[0], dz[1]);
        if (p.d_hidden) at.store_padded(p.d_hidden, p.width, i, n, dz[0], dz[1]);
      }
      if (folded) add_to_row(i, row_sums);
    }
  }
  if (!expand) return;
  const Fragment<Out> place(warp_row, warp_column * (kChunk / 2), kPanel);
  for (int step = -summed_chunks; step < back_chunks; ++step) {
    const int chunk = p.keep_tail ? back_chunks - 1 - step : step < 0 ? step + summed_chunks : step;
    const int column = chunk * kChunk + warp_column * (kChunk / 2) + 2 * pair;
    float out[2][kUpN][4] = {};
    float bias[kUpN][2], scales[kUpN][2];
    if constexpr (!kBackward) {
      load_own(bias, p.up_bias, column, p.out_dim);
      if (p.channel_scale) {
        load_own(scales, p.scale, column, p.out_dim);
      } else {
#pragma unroll
        for (int i = 0; i < 2 * kUpN; ++i) scales[i / 2][i % 2] = scale;
      }
#pragma unroll
      for (int i = 0; i < 8 * kUpN; ++i) {
        out[i / (4 * kUpN)][i / 4 % kUpN][i % 4] = bias[i / 4 % kUpN][i % 2];
      }
    }
    char* slot;
    for (int part = 0; part < p.parts; ++part) {
      begin_step();
      slot = shared + now.slot * L::kSlot;
      multiply<E, kWidth * kSize / 32, false, kBackward>(
          out, {hidden + part * L::kHiddenPanels * kPanel, kPanel, warp_row},
          {weights + now.weights * L::kWeights, kBackward ? 0 : L::kUp, warp_column * (kChunk / 2)},
          no_shift);
      now.advance(p);
    }

    if (kBackward && p.input_dropout.seed) {
      drop_gradients(p.input_dropout, out, number_of(first_row + warp_row + lane),
                     chunk * kChunk + warp_column * (kChunk / 2), p.dim);
    }
    if (kBackward && norm) {
      const char* const x = extra + (step + summed_chunks) % (p.lookahead + 1) * L::kX;
      if (!folded) {
        float gamma[kUpN][2];
        load_own(gamma, p.norm_weight, column, p.dim);
#pragma unroll
        for (int i = 0; i < 8 * kUpN; ++i) {
          out[i / (4 * kUpN)][i / 4 % kUpN][i % 4] *= gamma[i / 4 % kUpN][i % 2];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = warp_row + 8 * i + group;
        const float2 stats = tables.stats[row];
        const float rstd = fabsf(stats.y);
        float2 means = {0, 0}, row_sums = {0, 0};
        if (step >= 0) {
          const float2 a = tables.row_sums[0][row], b = tables.row_sums[1][row];
          means = {(a.x + b.x) / p.dim, (a.y + b.y) / p.dim};
        }
#pragma unroll
        for (int n = 0; n < kUpN; ++n) {
          const float2 at = load_pair<X>(x + place(i, n));
          float* const value = out[i / 2][n] + i % 2 * 2;
          const float2 normal = {(at.x - stats.x) * rstd, (at.y - stats.x) * rstd};
          if (step < 0) {
            row_sums.x += value[0] + value[1];
            row_sums.y += value[0] * normal.x + value[1] * normal.y;
          } else {
            value[0] = rstd * (value[0] - means.x - normal.x * means.y);
            value[1] = rstd * (value[1] - means.x - normal.y * means.y);
          }
        }
        if (step < 0) add_to_row(i, row_sums);
      }
      if (step < 0) continue;
    }
    const auto finish = [&](auto add_tail) {
#pragma unroll
      for (int i = 0; i < 4 * kUpN; ++i) {
        const int n = i % kUpN;
        char* const at = slot + place(i / kUpN, n);
        const float2 tail = decltype(add_tail)::value ? load_pair<Out>(at) : float2{0, 0};
        const float* const value = out[i / kUpN / 2][n] + i / kUpN % 2 * 2;
        if constexpr (kBackward) {
          store_pair<Out>(at, value[0] + tail.x, value[1] + tail.y);
        } else {
          store_pair<Out>(at, fmaf(scales[n][0], value[0], tail.x),
                          fmaf(scales[n][1], value[1], tail.y));
        }
      }
    };
    if (std::is_same_v<Out, Y> && p.add_tail) {
      finish(std::true_type{});
    } else {
      finish(std::false_type{});
    }
    __syncthreads();
    store_chunk<E, Out>(slot, rows, chunk, back_dim, p.out.aligned,
                        [&](int i) { return p.out.data + tables.out[i]; });
  }
}

// A block has one tile of rows, of one adapter; where it accumulates dWu, one after another.
template <class E, int kWidth, bool kBackward, bool kAccumulate, class X, class Y, bool kGrouped>
__global__ void __launch_bounds__(kThreads, kAccumulate ? 1 : 2)
    data_pass(const __grid_constant__ DataPass p) {
  extern __shared__ __align__(128) char shared[];
  if constexpr (kAccumulate) {
    UpGradient<E, Y> up(shared + Layout<E, kWidth, X, Y>(p, false).accumulators, p);
    up.clear(p.out_chunks);
    for (int tile = blockIdx.x; tile * kRows < p.rows; tile += gridDim.x) {
      pass_tile<E, kWidth, kBackward, true, X, Y, kGrouped>(p, tile, shared);
      __syncthreads();
    }
    up.store(p);
  } else {
    pass_tile<E, kWidth, kBackward, false, X, Y, kGrouped>(p, p.first_tile + blockIdx.x, shared);
  }
}

}  // namespace fastadapters::cuda

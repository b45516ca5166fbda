// The masks of dropout, from the stream of philox.h by vectors: the same bits.
#pragma once

#include "../philox.h"
#include "simd.h"

namespace fastadapters::cpu {
namespace {

typedef uint64_t Counters __attribute__((vector_size(4 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

// Of the lower halves of each 64 bits.
inline Counters multiply_halves(Counters a, Counters b) {
#if defined(__AVX512F__)
  return (Counters)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Counters)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// Blocks of four words, of which `low` has the first two of each and `high` the others, from block
// `first` on.
template <int first, size_t... lane>
inline Vec whole_blocks(Counters low, Counters high, std::index_sequence<lane...>) {
  return shuffle<(lane % 4 / 2 * kLanes + 2 * (first + lane / 4) + lane % 2)...>((Vec)low,
                                                                                 (Vec)high);
}

// Which elements of the rows of a matrix are kept, and what those are multiplied with.
struct Dropout {
  static constexpr int kAhead = 2;                      // vectors of counters under way at once
  static constexpr int kColumns = kAhead * 2 * kLanes;  // what is made at once

  bool on = false;
  float factor = 1;
  uint64_t key = 0, offset = 0;
  uint32_t threshold = 0;

  // `stream` is added to the offset of the seed.
  Dropout(const int64_t* seed, double p, uint64_t stream) {
    on = seed && p > 0;
    if (!on) return;
    factor = p < 1 ? float(1 / (1 - p)) : 0;
    key = uint64_t(seed[0]);
    offset = uint64_t(seed[1]) + stream;
    threshold = dropout_threshold(p);
  }

  // Of row `row`, -1 for what is kept and 0 for what is not: in whole kColumns.
  __attribute__((noinline)) void row(int64_t row, int64_t columns, int8_t* kept) const {
    const Counters m0 = Counters{} + 0xD2511F53u, m1 = Counters{} + 0xCD9E8D57u;
    Counters lanes = {};
    for (int i = 0; i < kLanes / 2; ++i) lanes[i] = uint64_t(i);
    int64_t blocks = divide_up(columns, 4);
    lanes += uint64_t(row * blocks);
    for (int64_t b = 0; b < blocks; b += kColumns / 4, lanes += kColumns / 4) {
      Counters c0[kAhead], c1[kAhead], c2[kAhead], c3[kAhead];
#pragma GCC unroll 2
      for (int i = 0; i < kAhead; ++i) {
        c0[i] = lanes + i * (kLanes / 2);
        c1[i] = c0[i] >> 32;
        c2[i] = Counters{} + offset;
        c3[i] = c2[i] >> 32;
      }
      // What the upper halves hold is no part of it.
      Counters k0 = Counters{} + key, k1 = k0 >> 32;
#pragma GCC unroll 10
      for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
        for (int i = 0; i < kAhead; ++i) {
          Counters p0 = multiply_halves(c0[i], m0), p1 = multiply_halves(c2[i], m1);
          c0[i] = (p1 >> 32) ^ c1[i] ^ k0;
          c1[i] = p1;
          c2[i] = (p0 >> 32) ^ c3[i] ^ k1;
          c3[i] = p0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
      }
#pragma GCC unroll 2
      for (int i = 0; i < kAhead; ++i) {
        Counters low = (c0[i] & 0xffffffff) | c1[i] << 32;
        Counters high = (c2[i] & 0xffffffff) | c3[i] << 32;
        auto lanes = std::make_index_sequence<kLanes>();
        int8_t* to = kept + 4 * b + i * 2 * kLanes;
        store_kept(to, whole_blocks<0>(low, high, lanes));
        store_kept(to + kLanes, whole_blocks<kLanes / 4>(low, high, lanes));
      }
    }
  }

 private:
  void store_kept(int8_t* to, Vec words) const {
    Bytes bytes = __builtin_convertvector((Word)words >= Word{} + threshold, Bytes);
    std::memcpy(to, &bytes, sizeof bytes);
  }
};

// The value where it is kept, else 0.
inline Vec where_kept(const int8_t* kept, float value) {
  Int mask = __builtin_convertvector(read<Bytes>(kept), Int);
  return (Vec)(mask & (Int)broadcast(value));
}

}  // namespace
}  // namespace fastadapters::cpu

// The AMX micro-kernel: blocks of up to 2 x 2 tiles of C, each [16, 16] fp32. Same interface and
// operand layouts as Gemm<Pair>.
#pragma once

#include "gemm.h"

namespace fastadapters::cpu {
namespace {

// gcc's tile intrinsics declare no memory operand: without this barrier stores that a tile reads,
// or loads of what a tile stored, may move across them.
inline void tile_fence() { asm volatile("" ::: "memory"); }

struct AmxGemm {
  using Unit = Pair;
  using Store = bfloat16;
  static constexpr int kRows = 16;
  static constexpr int kBlock = 32;
  static constexpr int kPanel = 2;
  static constexpr int kDepth = 16;
  static constexpr bool kFolds = false, kPacksOnTheWay = false;

  // The tile configuration belongs to the thread.
  struct Session {
    Session() {
      struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      tile_fence();
      _tile_loadconfig(&config);
    }
    ~Session() { _tile_release(); }
  };

  // Tiles 0..3 hold C row by row, 4 and 5 hold A, 6 and 7 hold B.
  template <int tall, int wide>
  static inline void run(int64_t words, const Store* a, int64_t lda, const float* b) {
    tile_fence();
    for (int64_t k = 0; k < words; k += 16) {
      const float* bk = b + k * wide * 16;
      _tile_loadd(6, bk, wide * 64);
      if constexpr (wide == 2) _tile_loadd(7, bk + 16, wide * 64);
      _tile_loadd(4, a + 2 * k, 2 * lda);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (wide == 2) _tile_dpbf16ps(1, 4, 7);
      if constexpr (tall == 2) {
        _tile_loadd(5, a + 16 * lda + 2 * k, 2 * lda);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (wide == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }

  template <int tall, int wide>
  static inline void store_tiles(float* c, int64_t ldc) {
    _tile_stored(0, c, 4 * ldc);
    if constexpr (wide == 2) _tile_stored(1, c + 16, 4 * ldc);
    if constexpr (tall == 2) _tile_stored(2, c + 16 * ldc, 4 * ldc);
    if constexpr (tall == 2 && wide == 2) _tile_stored(3, c + 16 * ldc + 16, 4 * ldc);
    tile_fence();
  }

  template <int wide, class Finish>
  static inline void product(int64_t rows, int64_t words, const Store* a, int64_t lda,
                             const float* b, const Finish& finish) {
    constexpr int64_t ldc = wide * kLanes;
    alignas(64) float c[kBlock * ldc];
    with_constant<2>(divide_up(rows, 16), [&](auto tall) {
      _tile_zero(0);
      if constexpr (wide == 2) _tile_zero(1);
      if constexpr (tall == 2) _tile_zero(2);
      if constexpr (tall == 2 && wide == 2) _tile_zero(3);
      run<tall, wide>(words, a, lda, b);
      store_tiles<tall, wide>(c, ldc);
    });
    auto row = finish();
    for (int64_t i = 0; i < rows; ++i) {
      Vec v[wide];
      for (int j = 0; j < wide; ++j) v[j] = read<Vec>(c + i * ldc + j * kLanes);
      row(i, v);
    }
  }

  template <int wide>
  static inline void accumulate(int64_t rows, int64_t words, const Store* a, int64_t lda,
                                const float* b, float* c, int64_t ldc) {
    with_constant<2>(divide_up(rows, 16), [&](auto tall) {
      tile_fence();
      _tile_loadd(0, c, 4 * ldc);
      if constexpr (wide == 2) _tile_loadd(1, c + 16, 4 * ldc);
      if constexpr (tall == 2) _tile_loadd(2, c + 16 * ldc, 4 * ldc);
      if constexpr (tall == 2 && wide == 2) _tile_loadd(3, c + 16 * ldc + 16, 4 * ldc);
      run<tall, wide>(words, a, lda, b);
      store_tiles<tall, wide>(c, ldc);
    });
  }
};

}  // namespace
}  // namespace fastadapters::cpu

// The tile instructions amx.h uses in plain C++. Tests put this file in front (-include) of its
// kernels, so that they run, and are checked by the sanitizers, on machines without AMX. Same
// results bit for bit (Intel SDM, TDPBF16PS): even and odd k are summed apart and added to C last,
// subnormals count as zero.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fastadapters::cpu {
namespace {

struct EmulatedTiles {
  bool configured = false;
  uint8_t rows[8];
  uint16_t bytes_per_row[8];
  alignas(64) uint8_t data[8][16][64];
};

inline EmulatedTiles& emulated_tiles() {
  static thread_local EmulatedTiles tiles;
  return tiles;
}

inline EmulatedTiles& configured_tiles() {
  EmulatedTiles& tiles = emulated_tiles();
  if (!tiles.configured) {
    std::fputs("AMX instruction without a tile configuration on this thread\n", stderr);
    std::abort();
  }
  return tiles;
}

inline void emulate_loadconfig(const void* config) {
  EmulatedTiles& tiles = emulated_tiles();
  const uint8_t* bytes = (const uint8_t*)config;
  std::memcpy(tiles.bytes_per_row, bytes + 16, sizeof tiles.bytes_per_row);
  std::memcpy(tiles.rows, bytes + 48, sizeof tiles.rows);
  std::memset(tiles.data, 0, sizeof tiles.data);
  tiles.configured = bytes[0] == 1;
}

inline void emulate_release() { emulated_tiles().configured = false; }

inline void emulate_zero(int t) { std::memset(configured_tiles().data[t], 0, 16 * 64); }

inline void emulate_load(int t, const void* base, int64_t stride) {
  EmulatedTiles& tiles = configured_tiles();
  emulate_zero(t);
  for (int i = 0; i < tiles.rows[t]; ++i)
    std::memcpy(tiles.data[t][i], (const char*)base + i * stride, tiles.bytes_per_row[t]);
}

inline void emulate_store(int t, void* base, int64_t stride) {
  EmulatedTiles& tiles = configured_tiles();
  for (int i = 0; i < tiles.rows[t]; ++i)
    std::memcpy((char*)base + i * stride, tiles.data[t][i], tiles.bytes_per_row[t]);
}

inline float flush_subnormal(uint32_t bits) {
  if (!(bits & 0x7f800000)) bits &= 0x80000000;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float flush_subnormal(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return flush_subnormal(bits);
}

inline void emulate_dpbf16ps(int c, int a, int b) {
  EmulatedTiles& tiles = configured_tiles();
  auto word = [&](int t, int row, int column) {
    uint32_t w;
    std::memcpy(&w, tiles.data[t][row] + 4 * column, sizeof w);
    return w;
  };
  for (int i = 0; i < tiles.rows[c]; ++i)
    for (int j = 0; j < tiles.bytes_per_row[c] / 4; ++j) {
      float even = 0, odd = 0;
      for (int k = 0; k < tiles.bytes_per_row[a] / 4; ++k) {
        uint32_t x = word(a, i, k), y = word(b, k, j);
        even = flush_subnormal(
            __builtin_fmaf(flush_subnormal(x << 16), flush_subnormal(y << 16), even));
        odd = flush_subnormal(
            __builtin_fmaf(flush_subnormal(x & 0xffff0000), flush_subnormal(y & 0xffff0000), odd));
      }
      float total = flush_subnormal(word(c, i, j)) + flush_subnormal(even + odd);
      total = flush_subnormal(total);
      std::memcpy(tiles.data[c][i] + 4 * j, &total, sizeof total);
    }
}

}  // namespace
}  // namespace fastadapters::cpu

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) fastadapters::cpu::emulate_loadconfig(config)
#define _tile_release() fastadapters::cpu::emulate_release()
#define _tile_zero(t) fastadapters::cpu::emulate_zero(t)
#define _tile_loadd(t, base, stride) fastadapters::cpu::emulate_load(t, base, stride)
#define _tile_stored(t, base, stride) fastadapters::cpu::emulate_store(t, base, stride)
#define _tile_dpbf16ps(c, a, b) fastadapters::cpu::emulate_dpbf16ps(c, a, b)

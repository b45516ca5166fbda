// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the
// dropout mask made of it: the same bits in every backend.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTADAPTERS_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTADAPTERS_UNROLL _Pragma("unroll")
#else
#define FASTADAPTERS_HOST_DEVICE static inline __attribute__((always_inline))
#define FASTADAPTERS_UNROLL _Pragma("GCC unroll 10")
#endif

namespace fastadapters {

struct PhiloxBlock {
  uint32_t lane[4];
};

FASTADAPTERS_HOST_DEVICE PhiloxBlock philox4x32(uint64_t key, uint64_t counter, uint64_t offset) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32);
  uint32_t c2 = uint32_t(offset), c3 = uint32_t(offset >> 32);
  FASTADAPTERS_UNROLL
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t(0xD2511F53u) * c0;
    uint64_t p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Element (row, col) of h [M, r] is lane col % 4 of block row * ceil(r / 4) + col / 4. It is
// dropped iff its lane is below the threshold.
inline uint32_t dropout_threshold(double p) {
  return uint32_t(std::fmin(std::nearbyint(p * 4294967296.0), 4294967295.0));
}

}  // namespace fastadapters

// What two threads do to each row of a chunk of x: to row threadIdx.x / 2.
#pragma once

#include "../tile.cuh"

namespace fastadapters::cuda {

// Over this one's half of the first `columns` elements: the sum of x less `about`, and of its
// square.
template <class E, class S>
__device__ __forceinline__ float2 sum_half_row(const char* panels, int columns, float about) {
  constexpr int kElements = 16 / sizeof(typename S::T);
  float2 sums = {0, 0};
#pragma unroll
  for (int i = 0; i < kPanels<E, S> * kSegments / 2; ++i) {
    const int segment = 2 * i + threadIdx.x % 2;
    float v[kElements];
    load_segment<S>(panels + segment / kSegments * kPanel +
                        segment_offset(threadIdx.x / 2, segment % kSegments),
                    v);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const float difference = segment * kElements + e < columns ? v[e] - about : 0;
      sums.x += difference;
      sums.y += difference * difference;
    }
  }
  return sums;
}

// Changes a chunk stored as S in place, by change(elements of a segment, the first one's column).
template <class E, class S, class Change>
__device__ __forceinline__ void change_half_row(char* panels, Change change) {
  constexpr int kElements = 16 / sizeof(typename S::T);
#pragma unroll 1
  for (int i = 0; i < kPanels<E, S> * kSegments / 2; ++i) {
    const int segment = 2 * i + threadIdx.x % 2;
    char* const place = panels + segment / kSegments * kPanel +
                        segment_offset(threadIdx.x / 2, segment % kSegments);
    float v[kElements];
    load_segment<S>(place, v);
    change(v, segment * kElements);
    store_segment<S>(place, v);
  }
}

}  // namespace fastadapters::cuda

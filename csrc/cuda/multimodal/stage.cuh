// One launch of independent work: products, sums of slabs, rows, the factor of the last layer.
#pragma once

#include <initializer_list>

#include "items.cuh"
#include "rows.cuh"

namespace fastadapters::cuda::head {

// out[i] = scale * sum over slabs of from[slab, i]
struct Sum {
  const float* from = nullptr;
  int slabs = 0;
  int64_t stride = 0, size = 0;
  float scale = 1;
  Parameter out;
};

enum class RowKind { text_length, inner_bias, gram, text_coefficient };

struct RowTask {
  RowKind kind;
  int count;
};

constexpr int kMaxProducts = 8, kMaxSums = 16, kMaxRows = 4, kBlockRows = kThreads / 32;
constexpr int kFewSlabs = 8, kSummed = 128;  // elements of a block of sums

struct Stage {
  Problem p;
  Gradients g;
  Product products[kMaxProducts];
  Sum sums[kMaxSums];
  RowTask rows[kMaxRows];
  int product_count = 0, sum_count = 0, row_count = 0, blocks = 0;
  bool factorise = false;    // by the first block
  double* factor = nullptr;  // room for it, or shared memory is
};

__host__ __device__ inline int blocks_of(const Sum& s) {
  const int per_block = s.slabs <= kFewSlabs ? kSummed : 32;
  return int((s.size + per_block - 1) / per_block);
}

// Few slabs: a thread has an element. Many: a warp has a part of the slabs.
__device__ inline void sum(const Sum& s, int block, float* shared) {
  if (s.slabs <= kFewSlabs) {
    const int64_t i = int64_t(block) * kSummed + threadIdx.x;
    if (i < s.size) store(s.out, i, s.scale * sum_slabs(s.from + i, s.slabs, s.stride));
    return;
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t i = int64_t(block) * 32 + lane;
  const int begin = s.slabs * warp / 4, end = s.slabs * (warp + 1) / 4;
  float total = 0;
  for (int slab = begin; i < s.size && slab < end; slab += 8) {
    float part = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (slab + k < end) part += s.from[(slab + k) * s.stride + i];
    }
    total += part;
  }
  shared[threadIdx.x] = total;
  __syncthreads();
  if (warp > 0 || i >= s.size) return;
  store(s.out, i,
        s.scale * (shared[lane] + shared[32 + lane] + shared[64 + lane] + shared[96 + lane]));
}

__global__ void __launch_bounds__(kThreads, 4) run_stage(const __grid_constant__ Stage s) {
  extern __shared__ __align__(16) float shared[];
  int block = blockIdx.x;
  if (s.factorise && block-- == 0) {
    return factorise(s.p, s.factor ? s.factor : reinterpret_cast<double*>(shared));
  }
  for (int i = 0; i < s.product_count; ++i) {
    const int tiles = tiles_of(s.products[i]);
    if (block < tiles) return multiply(s.products[i], block, shared);
    block -= tiles;
  }
  for (int i = 0; i < s.sum_count; ++i) {
    const int blocks = blocks_of(s.sums[i]);
    if (block < blocks) return sum(s.sums[i], block, shared);
    block -= blocks;
  }
  for (int i = 0; i < s.row_count; ++i) {
    const int blocks = (s.rows[i].count + kBlockRows - 1) / kBlockRows;
    const int row = block * kBlockRows + threadIdx.x / 32;
    if (block >= blocks) {
      block -= blocks;
      continue;
    }
    if (row >= s.rows[i].count) return;
    switch (s.rows[i].kind) {
      case RowKind::text_length:
        return text_length(s.p, row);
      case RowKind::inner_bias:
        return inner_bias(s.p, row);
      case RowKind::gram:
        return gram_row(s.p, row);
      default:
        return text_coefficient(s.p, s.g, row);
    }
  }
}

inline int64_t factor_bytes(const Problem& p) { return int64_t(p.rank + 1) * (p.rank + 1) * 8; }
constexpr int64_t kLargestFactor = 48 * 1024;  // in shared memory

// Collects a stage and launches it; what nobody wants (no `out` and no `tail`) is left out.
struct Builder {
  Stage stage;
  explicit Builder(const Problem& p, const Gradients& g = {}) {
    stage.p = p;
    stage.g = g;
  }
  void add(Product product) {
    if (!product.out.data && !product.tail.data) return;
    if (!product.out.data) {  // of the result there is only the last column
      product.n = 0;
      for (Segment& s : product.segments) s.right.columns = 0;
    }
    const int tiles = tiles_of(product);
    if (tiles == 0) return;
    stage.products[stage.product_count++] = product;
    stage.blocks += tiles;
  }
  void add(const Sum& sum) {
    if (!sum.out.data || sum.size == 0) return;
    stage.sums[stage.sum_count++] = sum;
    stage.blocks += blocks_of(sum);
  }
  void add(RowKind kind, int count) {
    if (count == 0) return;
    stage.rows[stage.row_count++] = {kind, count};
    stage.blocks += (count + kBlockRows - 1) / kBlockRows;
  }
  void run(cudaStream_t stream) {
    stage.blocks += stage.factorise;
    if (stage.blocks == 0) return;
    int shared = 2 * kStep * int(sizeof(float));
    if (stage.factorise && !stage.factor) {
      shared = std::max(shared, int(factor_bytes(stage.p)));
    }
    launch(run_stage, stage.blocks, kThreads, shared, stream, stage);
  }
};

// ---- Operands and products in a line

inline Operand matrix(const void* data, Dtype dtype, int rows, int columns, int64_t stride) {
  Operand o;
  o.data = data, o.dtype = dtype, o.rows = rows, o.columns = columns, o.stride = int(stride);
  return o;
}
inline Operand matrix(const float* data, int rows, int columns, int64_t stride) {
  return matrix(data, Dtype::float32, rows, columns, stride);
}
inline Operand matrix(const Parameter& p, int rows, int columns) {
  return matrix(p.data, p.dtype, rows, columns, columns);
}
inline Operand matrix(const Features& f, int rows, int columns) {
  return matrix(f.data, f.dtype, rows, columns, f.stride);
}
inline Operand transposed(Operand o) {
  o.transposed = true;
  return o;
}
inline Operand with_ones(Operand o) {
  o.ones = true;
  return o;
}
inline Operand with_column(Operand o, const Parameter& column) {
  o.column = column.data, o.column_dtype = column.dtype;
  return o;
}
inline Operand by_head(Operand o, int64_t batch) {
  o.batch = batch;
  return o;
}

inline Product product(int m, int n, std::initializer_list<Segment> segments) {
  Product p;
  p.m = m, p.n = n;
  for (const Segment& s : segments) {
    if (s.depth > 0) p.segments[p.parts++] = s;
  }
  return p;
}

}  // namespace fastadapters::cuda::head

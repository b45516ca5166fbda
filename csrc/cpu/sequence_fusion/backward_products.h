// The first half of backward: from dy through the product over the modalities to dU and dP.
#pragma once

#include "gradients.h"

namespace fastadapters::cpu {
namespace {

struct FactorTask {
  int64_t stride;  // of a row of the transposed P
  float *products[kMaxModalities], *transposed[kMaxModalities], *d_products[kMaxModalities];
  float* factors[kMaxModalities];  // F, then G, of one panel
  float* dy;
  const char** dy_rows;
  FactorTask(Carver& c, const SequenceFusionBackward& p, const BackwardShared& shared) {
    int64_t rows = items_at_a_time(p) * p.out_len;
    int64_t tile = rows * Columns::kPanel * kLanes;
    stride = round_up(rows, kLanes);
    for (int i = 0; i < p.modalities; ++i) {
      const Modality& m = p.modality[i];
      products[i] = c.take<float>(p.rank() * rows * m.width + kLanes);
      transposed[i] = c.take<float>(p.rank() * m.width * stride, shared.modality[i].needs.up);
      d_products[i] = c.take<float>(p.rank() * rows * shared.modality[i].r_stride,
                                    shared.modality[i].needs.products);
      factors[i] = c.take<float>(tile);
    }
    dy = c.take<float>(tile);
    dy_rows = c.take<const char*>(rows);
  }
};

// F of all modalities to G, by products of those in front and of those behind: nothing divides.
inline void leave_one_out(int modalities, int64_t n, const FactorTask& task) {
  for (int64_t j = 0; j < n; j += kLanes) {
    Vec before[kMaxModalities], product = read<Vec>(task.dy + j);
    for (int m = 0; m < modalities; ++m) {
      before[m] = product;
      product *= read<Vec>(task.factors[m] + j);
    }
    product = broadcast(1);
    for (int m = modalities - 1; m >= 0; --m) {
      Vec factor = read<Vec>(task.factors[m] + j);
      store(task.factors[m] + j, before[m] * product);
      product *= factor;
    }
  }
}

// dP and dU of the items from `first` on.
inline void differentiate_products(const SequenceFusionBackward& p, BackwardShared& shared,
                                   int64_t t, int64_t first, int64_t items,
                                   const FactorTask& task) {
  int64_t rows = items * p.out_len, rank = p.rank();
  for (int i = 0; i < p.modalities; ++i) {
    const BackwardModality& own = shared.modality[i];
    int64_t r = p.modality[i].width, n = p.out_len * r;
    for (int64_t item = 0; item < items; ++item)
      for (int64_t q = 0; q < rank; ++q)
        std::memcpy(task.products[i] + (q * items + item) * n,
                    products_of(p, i, first + item) + q * n, n * sizeof(float));
    for (int64_t q = 0; own.needs.up && q < rank; ++q)
      transpose_into(task.products[i] + q * rows * r, r, rows, r,
                     task.transposed[i] + q * r * task.stride, task.stride);
    if (own.needs.products)
      std::memset(task.d_products[i], 0, rank * rows * own.r_stride * sizeof(float));
  }

  for (int64_t item = 0; item < items; ++item)
    for (int64_t i = 0; i < p.out_len; ++i)
      task.dy_rows[item * p.out_len + i] = row_of(p.dy, p.out_dtype, first + item, i);
  const int64_t d = p.dim;
  const Columns columns = shared.modality[0].up.columns;
  for (int64_t panel = 0; panel < columns.count; ++panel) {
    int64_t column = columns.first(panel) * kLanes, width = columns.size(panel) * kLanes;
    float* to = task.dy;
    int64_t size = item_size(p.out_dtype), next = (column + width) * size;
    with_reader(p.out_dtype, p.out_dtype, [&](auto read) {
      for (int64_t row = 0; row < rows; ++row) {
        const char* dy = task.dy_rows[row];
        prefetch_columns<0, 3>(dy + next, width * size);
        for (int64_t j = 0; j < width; j += kLanes)
          store(to + row * width + j, read(dy, column + j, d - column - j));
      }
    });
    for (int64_t q = 0; q < rank; ++q) {
      for (int i = 0; i < p.modalities && p.modalities > 1; ++i) {
        int64_t r = p.modality[i].width;
        multiply<false>(rows, r, task.products[i] + q * rows * r, r,
                        shared.modality[i].up.panel(p.modality[i], q, panel), width, width,
                        task.factors[i], width);
      }
      leave_one_out(p.modalities, rows * width, task);
      for (int i = 0; i < p.modalities; ++i) {
        BackwardModality& own = shared.modality[i];
        int64_t r = p.modality[i].width;
        if (own.needs.up)
          multiply<true>(r, rows, task.transposed[i] + q * r * task.stride, task.stride,
                         task.factors[i], width, width,
                         own.d_up[t].part + r * (q * columns.columns() + column), width);
        if (own.needs.products)
          multiply<true>(rows, least(width, p.dim - column), task.factors[i], width,
                         own.up_transposed + (q * p.dim + column) * own.r_stride, own.r_stride, r,
                         task.d_products[i] + q * rows * own.r_stride, own.r_stride);
      }
    }
  }

  for (int i = 0; i < p.modalities; ++i) {
    BackwardModality& own = shared.modality[i];
    own.d_up[t].advance(rows);
    int64_t n = p.out_len * own.r_stride;
    for (int64_t item = 0; own.needs.products && item < items; ++item)
      for (int64_t q = 0; q < rank; ++q)
        std::memcpy(own.products + ((first + item) * rank + q) * n,
                    task.d_products[i] + (q * items + item) * n, n * sizeof(float));
  }
}

}  // namespace
}  // namespace fastadapters::cpu

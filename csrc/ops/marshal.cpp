#include "marshal.h"

#include <torch/csrc/stable/ops.h>

#include <cstring>

namespace fastadapters::ops {

Dtype dtype_of(const Tensor& t) {
  ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
      "expected a float32, bfloat16 or float16 tensor");
  return type == ScalarType::Float      ? Dtype::float32
         : type == ScalarType::BFloat16 ? Dtype::bfloat16
                                        : Dtype::float16;
}

Dtype dtype_of(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= 2, "expected a code of float32, bfloat16 or float16");
  return Dtype(code);
}

ScalarType scalar_type(Dtype dtype) {
  return dtype == Dtype::float32    ? ScalarType::Float
         : dtype == Dtype::bfloat16 ? ScalarType::BFloat16
                                    : ScalarType::Half;
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

void* values_of(const Tensor& t, const char* name) {
  const void* data = t.const_data_ptr();
  STD_TORCH_CHECK(data || t.numel() == 0, name, ": expected a tensor whose memory is not freed");
  return const_cast<void*>(data);
}

Tensor empty(const Tensor& like, IntHeaderOnlyArrayRef sizes, ScalarType type) {
  int64_t dim = int64_t(sizes.size());
  std::vector<int64_t> strides(dim);
  int64_t numel = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = numel;
    numel *= sizes[i] > 1 ? sizes[i] : 1;
  }
  int32_t dtype = type == ScalarType::Float      ? aoti_torch_dtype_float32()
                  : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                 : aoti_torch_dtype_float16();
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes.data(), strides.data(), dtype, device,
                               like.is_cpu() ? 0 : like.get_device_index(), &handle));
  return Tensor(handle);
}

void Marshal::parameter(Parameter& p, const OptionalTensor& t, int64_t numel, const char* name) {
  if (!t) return;
  Tensor c = t->is_contiguous() ? *t : torch::stable::contiguous(*t);
  fill(p, c, values_of(c, name), numel, name);
  kept_.push_back(std::move(c));
}

void Marshal::gradient(Parameter& p, const OptionalTensor& t, int64_t numel, const char* name) {
  if (!t) return;
  STD_TORCH_CHECK(t->is_contiguous(), name, ": expected a contiguous tensor");
  fill(p, *t, t->mutable_data_ptr(), numel, name);
}

const int64_t* Marshal::seed(const OptionalTensor& t) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(same_device(*t, like_) && t->scalar_type() == ScalarType::Long &&
                      t->is_contiguous() && t->numel() == 2,
                  "seed: expected a contiguous int64 tensor [2] on x's device");
  return (const int64_t*)t->const_data_ptr();
}

void Marshal::rows(Rows& rows, const OptionalTensor& t, int64_t columns, Dtype dtype, bool input,
                   const char* name) {
  if (!t) return;
  Tensor view = *t;
  STD_TORCH_CHECK(same_device(view, like_) && view.scalar_type() == scalar_type(dtype), name,
                  ": expected a tensor of another dtype, or on x's device");
  if (view.dim() > 0 && view.size(-1) > 1 && view.stride(-1) != 1) {
    STD_TORCH_CHECK(input, name, ": expected a tensor whose last dimension has stride 1");
    view = torch::stable::contiguous(view);
  }
  views_.push_back({&rows, view, columns, input, name});
}

void Marshal::finish() {
  auto shape = like_.sizes();
  for (View& v : views_) {
    auto sizes = v.tensor.sizes();
    bool same = sizes.size() == shape.size();
    for (size_t i = 0; same && i + 1 < shape.size(); ++i) same = sizes[i] == shape[i];
    STD_TORCH_CHECK(same && sizes.back() == v.columns, v.name, ": expected the row dimensions of ",
                    "x and ", v.columns, " columns");
  }
  if (!merge())
    for (View& v : views_)
      if (v.input) v.tensor = torch::stable::contiguous(v.tensor);
  STD_TORCH_CHECK(merge(), "expected outputs with at most three dimensions of rows");
  for (View& v : views_)
    v.rows->data = v.input ? values_of(v.tensor, v.name) : v.tensor.mutable_data_ptr();
}

void* Marshal::saved(const OptionalTensor& t, int64_t columns, ScalarType type, const char* name) {
  if (!t || (t->numel() == 0 && columns * count() != 0)) return nullptr;
  STD_TORCH_CHECK(same_device(*t, like_) && t->is_contiguous() && t->scalar_type() == type &&
                      t->numel() == columns * count(),
                  name, ": expected a contiguous tensor [M, ", columns, "] on x's device");
  return t->mutable_data_ptr();
}

void Marshal::fill(Parameter& p, const Tensor& t, void* data, int64_t numel, const char* name) {
  STD_TORCH_CHECK(same_device(t, like_) && t.numel() == numel, name, ": expected a tensor with ",
                  numel, " elements on x's device");
  p = {data, dtype_of(t)};
}

bool Marshal::merge() {
  int used = 0;
  shape_[0] = shape_[1] = shape_[2] = 1;
  for (View& v : views_) std::memset(v.rows->strides, 0, sizeof v.rows->strides);
  const Tensor& first = views_[0].tensor;
  for (int64_t dim = 0; dim < first.dim() - 1; ++dim)
    if (first.size(dim) == 0) {
      shape_[2] = 0;
      return true;
    }
  for (int64_t dim = views_[0].tensor.dim() - 2; dim >= 0; --dim) {
    int64_t size = views_[0].tensor.size(dim);
    if (size == 1) continue;
    bool mergeable = used > 0;
    for (View& v : views_)
      mergeable &= v.tensor.stride(dim) == v.rows->strides[3 - used] * shape_[3 - used];
    if (mergeable) {
      shape_[3 - used] *= size;
      continue;
    }
    if (++used > 3) return false;
    shape_[3 - used] = size;
    for (View& v : views_) v.rows->strides[3 - used] = v.tensor.stride(dim);
  }
  return true;
}

}  // namespace fastadapters::ops

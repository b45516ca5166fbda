// Tensors of PyTorch's stable ABI in, raw pointers out. Friendly messages for bad arguments are
// Python's (fastadapters/functional), the checks here are for memory safety.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <optional>
#include <vector>

#include "../tensors.h"

namespace fastadapters::ops {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Dtype dtype_of(const Tensor& t);
Dtype dtype_of(int64_t code);
ScalarType scalar_type(Dtype dtype);
bool same_device(const Tensor& a, const Tensor& b);

// What the kernels read of t: null only if it has no elements. What shards parameters frees them
// and leaves the tensor its shape.
void* values_of(const Tensor& t, const char* name);

// Uninitialised and contiguous, on the device of `like`.
Tensor empty(const Tensor& like, IntHeaderOnlyArrayRef sizes, ScalarType type);

// The arguments of one call as the kernels want them. Copies made on the way live as long as this
// does.
class Marshal {
 public:
  // Sets `shape`, the sizes of up to three row dimensions of `like` [..., D], in finish().
  Marshal(const Tensor& like, int64_t (&shape)[3]) : like_(like), shape_(shape) {}

  void parameter(Parameter& p, const OptionalTensor& t, int64_t numel, const char* name);

  // An absent tensor is a gradient nobody wants.
  void gradient(Parameter& p, const OptionalTensor& t, int64_t numel, const char* name);

  // [2]: the key and the offset of the Philox stream, or null.
  const int64_t* seed(const OptionalTensor& t);

  // Tensors of the row dimensions of `like`. `input` ones are copied if the kernels cannot read
  // them in place.
  void rows(Rows& rows, const OptionalTensor& t, int64_t columns, Dtype dtype, bool input,
            const char* name);

  // Merges the row dimensions that are one in every tensor.
  void finish();

  // After finish(): one row [columns] for each of `like`, contiguous; null if absent or empty.
  void* saved(const OptionalTensor& t, int64_t columns, ScalarType type, const char* name);

 private:
  struct View {
    Rows* rows;
    Tensor tensor;
    int64_t columns;
    bool input;
    const char* name;
  };

  void fill(Parameter& p, const Tensor& t, void* data, int64_t numel, const char* name);
  bool merge();
  int64_t count() const { return shape_[0] * shape_[1] * shape_[2]; }

  const Tensor& like_;
  int64_t (&shape_)[3];
  std::vector<Tensor> kept_;
  std::vector<View> views_;
};

}  // namespace fastadapters::ops

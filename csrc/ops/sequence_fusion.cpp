// Sequence fusion on PyTorch's stable ABI. Its schemas are defined in Python (fastadapters/ops).
#include "../sequence_fusion.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <deque>
#include <tuple>
#include <utility>

#include "run.h"
#ifndef FASTADAPTERS_SIMULATION
#include "../cpu/sequence_fusion/sequence_fusion.h"
#endif
#ifdef FASTADAPTERS_CUDA
#include "../cuda/sequence_fusion/sequence_fusion.h"
#endif

namespace {

using namespace fastadapters;
using namespace fastadapters::ops;

using Tensors = std::vector<Tensor>;

struct Options {
  const Tensors &down_weights, &down_biases, &time_factors, &feature_factors;
  const OptionalTensor& lengths;
  int64_t activation, compute_dtype, out_dtype;
  bool summed, add_leading;
};

OptionalTensor present(const Tensor& t) { return t.numel() ? OptionalTensor(t) : OptionalTensor(); }

// The arguments of a call. A tensor [B, T, D] keeps its two row dimensions: the kernels take them
// apart.
class Arguments {
 public:
  Arguments(SequenceFusion& args, const Tensor& out, const Tensors& inputs, const Options& o) {
    size_t m = inputs.size();
    STD_TORCH_CHECK(m >= 1 && m <= size_t(kMaxModalities) && o.down_weights.size() == m &&
                        o.down_biases.size() == m && o.time_factors.size() == m &&
                        o.feature_factors.size() == m,
                    "expected one tensor for each of 1 to ", kMaxModalities, " modalities");
    args.modalities = int(m);
    args.dtype = dtype_of(o.compute_dtype);
    args.out_dtype = dtype_of(o.out_dtype);
    STD_TORCH_CHECK(o.time_factors[0].dim() == 3 && o.feature_factors[0].dim() == 3,
                    "expected time_factors [R, T, T_o], feature_factors [R, r, D]");
    args.items = inputs[0].size(0);
    args.out_len = o.time_factors[0].size(2);
    args.dim = o.feature_factors[0].size(2);
    args.time_rank = o.time_factors[0].size(0);
    args.feature_rank = o.feature_factors[0].size(0);
    args.summed = o.summed;
    STD_TORCH_CHECK(o.summed || args.time_rank == args.feature_rank,
                    "expected time and feature factors of one rank");
    STD_TORCH_CHECK(o.activation >= 0 && o.activation <= 5, "activation: expected 0 to 5");
    args.activation = Activation(o.activation);
    args.add_leading = o.add_leading;
    stored(args.out_dtype, args.dtype);
    if (o.lengths)
      STD_TORCH_CHECK(same_device(*o.lengths, out) && o.lengths->is_contiguous() &&
                          o.lengths->scalar_type() == ScalarType::Long &&
                          o.lengths->numel() == int64_t(m) * args.items,
                      "lengths: expected a contiguous int64 tensor [M, B]");
    for (size_t i = 0; i < m; ++i) modality(args, out, i, inputs[i], o);
  }

  // A tensor [items, tokens, dim].
  void rows(Rows& rows, const Tensor& t, int64_t items, int64_t tokens, int64_t dim, Dtype dtype,
            bool input, const char* name) {
    STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == items && t.size(1) == tokens && t.size(2) == dim &&
                        t.scalar_type() == scalar_type(dtype),
                    name, ": expected a tensor of another shape or dtype");
    Tensor view = t;
    if (dim > 1 && t.stride(2) != 1) {
      STD_TORCH_CHECK(input, name, ": expected a tensor whose last dimension has stride 1");
      view = torch::stable::contiguous(t);
      kept_.push_back(view);
    }
    rows.data = input ? values_of(view, name) : view.mutable_data_ptr();
    rows.strides[1] = view.stride(0);
    rows.strides[2] = view.stride(1);
  }

  Marshal& parameters() { return *marshal_; }

  static void stored(Dtype dtype, Dtype products) {
    STD_TORCH_CHECK(dtype == products || dtype == Dtype::float32,
                    "expected x and y in the dtype of the products or in float32");
  }

 private:
  void modality(SequenceFusion& args, const Tensor& out, size_t i, const Tensor& x,
                const Options& o) {
    Modality& to = args.modality[i];
    STD_TORCH_CHECK(x.dim() == 3 && same_device(x, out), "expected x [B, T, D] on one device");
    to.x_dtype = dtype_of(x);
    stored(to.x_dtype, args.dtype);
    to.tokens = x.size(1);
    to.dim = x.size(2);
    to.width = o.down_weights[i].size(0);
    to.factor_tokens = o.time_factors[i].size(1);
    STD_TORCH_CHECK(to.tokens <= to.factor_tokens,
                    "time_factors: expected one row or more for each token");
    rows(to.x, x, args.items, to.tokens, to.dim, to.x_dtype, true, "inputs");
    if (o.lengths) to.lengths = (const int64_t*)o.lengths->const_data_ptr() + i * args.items;
    if (!marshal_) marshal_.emplace(out, shape_);
    Marshal& m = *marshal_;
    m.parameter(to.down_weight, o.down_weights[i], to.width * to.dim, "down_weights");
    m.parameter(to.down_bias, present(o.down_biases[i]), to.width, "down_biases");
    m.parameter(to.time_factor, o.time_factors[i], args.time_rank * to.factor_tokens * args.out_len,
                "time_factors");
    m.parameter(to.feature_factor, o.feature_factors[i], args.feature_rank * to.width * args.dim,
                "feature_factors");
  }

  int64_t shape_[3];
  std::optional<Marshal> marshal_;
  std::deque<Tensor> kept_;
};

// How many numbers of P and of z all modalities have.
std::pair<int64_t, int64_t> saved_sizes(const SequenceFusion& args) {
  int64_t products = 0, z = 0;
  for (int i = 0; i < args.modalities; ++i) {
    products += args.items * args.rank() * args.out_len * args.modality[i].width;
    z += args.items * args.modality[i].tokens * args.modality[i].width;
  }
  return {products, z};
}

std::tuple<Tensor, Tensor, Tensor> sequence_fusion_forward(
    Tensors inputs, OptionalTensor residual, Tensors down_weights, Tensors down_biases,
    Tensors time_factors, Tensors feature_factors, OptionalTensor lengths, int64_t activation,
    int64_t compute_dtype, int64_t out_dtype, bool summed, bool add_leading, bool save) {
  SequenceFusionForward args;
  const Tensor& x = inputs.at(0);
  Arguments a(args, x, inputs,
              {down_weights, down_biases, time_factors, feature_factors, lengths, activation,
               compute_dtype, out_dtype, summed, add_leading});
  auto [products, z] = saved_sizes(args);
  Tensor y = empty(x, {args.items, args.out_len, args.dim}, scalar_type(args.out_dtype));
  Tensor saved_products = empty(x, {save ? products : 0}, ScalarType::Float);
  Tensor saved_z = empty(x, {save ? z : 0}, scalar_type(args.dtype));
  if (residual)
    a.rows(args.residual, *residual, args.items, args.out_len, args.dim, args.out_dtype, true,
           "residual");
  a.rows(args.y, y, args.items, args.out_len, args.dim, args.out_dtype, false, "y");
  if (saved_products.numel()) args.products = (float*)saved_products.mutable_data_ptr();
  if (saved_z.numel()) args.z = saved_z.mutable_data_ptr();
  run(args, x, args.dtype == Dtype::float32, FASTADAPTERS_KERNELS(sequence_fusion_forward));
  return {y, saved_products, saved_z};
}

Tensors sequence_fusion_backward(Tensor dy, Tensors inputs, Tensor products, Tensor z,
                                 Tensors down_weights, Tensors down_biases, Tensors time_factors,
                                 Tensors feature_factors, OptionalTensor lengths,
                                 int64_t activation, int64_t compute_dtype, int64_t out_dtype,
                                 bool summed, bool add_leading, int64_t needs) {
  SequenceFusionBackward args;
  Arguments a(args, dy, inputs,
              {down_weights, down_biases, time_factors, feature_factors, lengths, activation,
               compute_dtype, out_dtype, summed, add_leading});
  a.rows(args.dy, dy, args.items, args.out_len, args.dim, args.out_dtype, true, "dy");
  auto [p, n_z] = saved_sizes(args);
  STD_TORCH_CHECK(products.is_contiguous() && products.scalar_type() == ScalarType::Float &&
                      (products.numel() == p || !products.numel()) && same_device(products, dy),
                  "products: expected what the forward saved");
  STD_TORCH_CHECK(z.is_contiguous() && z.scalar_type() == scalar_type(args.dtype) &&
                      (z.numel() == n_z || !z.numel()) && same_device(z, dy),
                  "z: expected what the forward saved");
  if (products.numel()) args.products = (float*)products.mutable_data_ptr();
  if (z.numel()) args.z = z.mutable_data_ptr();

  int m = args.modalities;
  Tensors results;
  const Tensors* groups[] = {&inputs, &down_weights, &down_biases, &time_factors, &feature_factors};
  for (int group = 0; group < 5; ++group)
    for (int i = 0; i < m; ++i) {
      const Tensor& like = (*groups[group])[i];
      bool wanted = needs >> (group * m + i) & 1;
      results.push_back(wanted ? empty(like, like.sizes(), like.scalar_type())
                               : empty(like, {0}, like.scalar_type()));
      if (!wanted) continue;
      const Tensor& result = results.back();
      Modality& of = args.modality[i];
      SequenceFusionBackward::Gradients& to = args.gradients[i];
      Parameter* parameters[] = {&to.d_down_weight, &to.d_down_bias, &to.d_time_factor,
                                 &to.d_feature_factor};
      if (group == 0)
        a.rows(to.dx, result, args.items, of.tokens, of.dim, of.x_dtype, false, "dx");
      else
        a.parameters().gradient(*parameters[group - 1], result, like.numel(), "gradient");
    }
  run(args, dy, args.dtype == Dtype::float32, FASTADAPTERS_KERNELS(sequence_fusion_backward));
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTADAPTERS_NAMESPACE, CPU, m) {
  m.impl("sequence_fusion_forward", TORCH_BOX(&sequence_fusion_forward));
  m.impl("sequence_fusion_backward", TORCH_BOX(&sequence_fusion_backward));
}

#if defined(FASTADAPTERS_CUDA) && !defined(FASTADAPTERS_SIMULATION)
STABLE_TORCH_LIBRARY_IMPL(FASTADAPTERS_NAMESPACE, CUDA, m) {
  m.impl("sequence_fusion_forward", TORCH_BOX(&sequence_fusion_forward));
  m.impl("sequence_fusion_backward", TORCH_BOX(&sequence_fusion_backward));
}
#endif

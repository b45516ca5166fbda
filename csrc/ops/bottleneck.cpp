// The bottleneck on PyTorch's stable ABI. Its schemas are defined in Python (fastadapters/ops).
#include "../cpu/bottleneck/bottleneck.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "run.h"
#ifdef FASTADAPTERS_CUDA
#include "../cuda/bottleneck/bottleneck.h"
#endif

namespace {

using namespace fastadapters;
using namespace fastadapters::ops;

struct Options {
  const OptionalTensor &down_bias, &up_bias, &norm_weight, &norm_bias, &scale, &seed;
  double scale_value, norm_eps, dropout;
  int64_t activation, compute_dtype, out_dtype;
};

// `like` has the shape of x, which may be empty in backward. Parameters of `groups` are stacked.
void marshal(Marshal& m, Bottleneck& args, const Tensor& like, const Tensor& x,
             const Tensor& down_weight, const Tensor& up_weight, const Options& o,
             Groups* groups = nullptr) {
  STD_TORCH_CHECK(like.dim() >= 1 && down_weight.dim() == (groups ? 3 : 2),
                  "expected x [..., D], down_weight [r, D], or stacked [N, r, D]");
  int64_t d = args.dim = like.size(-1), r = args.bottleneck = down_weight.size(-2);
  int64_t n = groups ? groups->adapters = down_weight.size(0) : 1;
  args.dtype = dtype_of(o.compute_dtype);
  args.x_dtype = dtype_of(x);
  args.out_dtype = dtype_of(o.out_dtype);
  for (Dtype stored : {args.x_dtype, args.out_dtype})
    STD_TORCH_CHECK(stored == args.dtype || stored == Dtype::float32,
                    "expected x and y in the dtype of the products or in float32");
  bool absent = x.numel() == 0 && like.numel() != 0;
  m.rows(args.x, absent ? OptionalTensor() : OptionalTensor(x), args.x_dtype, true, "x");
  m.parameter(args.down_weight, down_weight, n * r * d, "down_weight");
  m.parameter(args.down_bias, o.down_bias, n * r, "down_bias");
  m.parameter(args.up_weight, up_weight, n * d * r, "up_weight");
  m.parameter(args.up_bias, o.up_bias, n * d, "up_bias");
  m.parameter(args.norm_weight, o.norm_weight, n * d, "norm_weight");
  m.parameter(args.norm_bias, o.norm_bias, n * d, "norm_bias");
  args.channel_scale = o.scale && (o.scale->numel() != n || d == 1);
  m.parameter(args.scale, o.scale, n * (args.channel_scale ? d : 1), "scale");
  STD_TORCH_CHECK(o.activation >= 0 && o.activation <= 5, "activation: expected 0 to 5");
  args.activation = Activation(o.activation);
  args.scale_value = float(o.scale_value);
  args.norm_eps = float(o.norm_eps);
  args.dropout = o.dropout;
  args.seed = m.seed(o.seed);
}

// The gradients of the parameters, of which there are `n`.
void marshal_gradients(Marshal& m, BottleneckBackward& args, const OptionalTensor (&gradients)[7],
                       int64_t n) {
  int64_t d = args.dim, r = args.bottleneck, scale = args.channel_scale ? d : 1;
  m.gradient(args.d_down_weight, gradients[0], n * r * d, "d_down_weight");
  m.gradient(args.d_down_bias, gradients[1], n * r, "d_down_bias");
  m.gradient(args.d_up_weight, gradients[2], n * d * r, "d_up_weight");
  m.gradient(args.d_up_bias, gradients[3], n * d, "d_up_bias");
  m.gradient(args.d_norm_weight, gradients[4], n * d, "d_norm_weight");
  m.gradient(args.d_norm_bias, gradients[5], n * d, "d_norm_bias");
  m.gradient(args.d_scale, gradients[6], n * scale, "d_scale");
}

// What backward has to be given, as it was saved.
void check_saved(const BottleneckBackward& args, const Tensor& x) {
  bool none = !args.count();
  STD_TORCH_CHECK(none || args.x.data || !args.needs_x(), "x: expected its values");
  STD_TORCH_CHECK(none || args.z || (on_cuda(x) && args.norm_weight.data) || !args.needs_z(),
                  "z: expected [M, r], as saved by the forward");
  STD_TORCH_CHECK(none || args.stats || !args.norm_weight.data || !args.needs_x(),
                  "stats: expected [M, 2], as saved by the forward");
}

// What a gradient is written to: shaped like what it is of, where it is wanted.
OptionalTensor gradient_of(const Tensor& x, bool wanted, const OptionalTensor& like) {
  if (!like || !wanted) return {};
  return empty(x, like->sizes().data(), like->dim(), like->scalar_type());
}

void run(const BottleneckForward& args, [[maybe_unused]] const Tensor& x) {
#ifdef FASTADAPTERS_CUDA
  if (on_cuda(x)) {
    return run_cuda(args, x, args.dtype == Dtype::float32, &cuda::bottleneck_forward_workspace,
                    &cuda::bottleneck_forward);
  }
#endif
#ifndef FASTADAPTERS_SIMULATION
  cpu::bottleneck_forward(args, threads());
#endif
}

void run(const BottleneckBackward& args, [[maybe_unused]] const Tensor& x) {
#ifdef FASTADAPTERS_CUDA
  if (on_cuda(x)) {
    STD_TORCH_CHECK(args.x.data || !args.norm_weight.data || !args.needs_z() || !args.count(),
                    "x: expected values, of which z is made anew");
    return run_cuda(args, x, args.dtype == Dtype::float32, &cuda::bottleneck_backward_workspace,
                    &cuda::bottleneck_backward);
  }
#endif
#ifndef FASTADAPTERS_SIMULATION
  cpu::bottleneck_backward(args, threads());
#endif
}

void bottleneck_forward_out(Tensor y, OptionalTensor z, OptionalTensor stats, Tensor x,
                            OptionalTensor residual, Tensor down_weight, OptionalTensor down_bias,
                            Tensor up_weight, OptionalTensor up_bias, OptionalTensor norm_weight,
                            OptionalTensor norm_bias, OptionalTensor scale, OptionalTensor seed,
                            double scale_value, double norm_eps, double dropout, int64_t activation,
                            int64_t compute_dtype, int64_t out_dtype, bool add_x) {
  BottleneckForward args;
  Marshal m(x, args.rows);
  marshal(m, args, x, x, down_weight, up_weight,
          {down_bias, up_bias, norm_weight, norm_bias, scale, seed, scale_value, norm_eps, dropout,
           activation, compute_dtype, out_dtype});
  m.rows(args.residual, add_x ? OptionalTensor(x) : residual, args.out_dtype, true, "residual");
  m.rows(args.y, y, args.out_dtype, false, "y");
  m.finish();
  args.z = m.saved(z, args.bottleneck, scalar_type(args.dtype), "z");
  args.stats = (float*)m.saved(stats, 2, ScalarType::Float, "stats");
  run(args, x);
}

std::tuple<Tensor, Tensor, Tensor> bottleneck_forward(
    Tensor x, OptionalTensor residual, Tensor down_weight, OptionalTensor down_bias,
    Tensor up_weight, OptionalTensor up_bias, OptionalTensor norm_weight, OptionalTensor norm_bias,
    OptionalTensor scale, OptionalTensor seed, double scale_value, double norm_eps, double dropout,
    int64_t activation, int64_t compute_dtype, int64_t out_dtype, bool add_x, bool save) {
  ScalarType type = scalar_type(dtype_of(compute_dtype));
  int64_t d = x.size(-1), m = d ? x.numel() / d : 0, r = down_weight.size(0);
  Tensor y = fresh_output(x, scalar_type(dtype_of(out_dtype)));
  Tensor z = save && !(on_cuda(x) && norm_weight) ? empty(x, {m, r}, type) : empty(x, {0}, type);
  Tensor stats =
      save && norm_weight ? empty(x, {m, 2}, ScalarType::Float) : empty(x, {0}, ScalarType::Float);
  bottleneck_forward_out(y, z, stats, x, residual, down_weight, down_bias, up_weight, up_bias,
                         norm_weight, norm_bias, scale, seed, scale_value, norm_eps, dropout,
                         activation, compute_dtype, out_dtype, add_x);
  return {y, z, stats};
}

void bottleneck_backward_out(OptionalTensor dx, OptionalTensor d_down_weight,
                             OptionalTensor d_down_bias, OptionalTensor d_up_weight,
                             OptionalTensor d_up_bias, OptionalTensor d_norm_weight,
                             OptionalTensor d_norm_bias, OptionalTensor d_scale, Tensor dy,
                             Tensor x, OptionalTensor z, OptionalTensor stats, Tensor down_weight,
                             OptionalTensor down_bias, Tensor up_weight, OptionalTensor up_bias,
                             OptionalTensor norm_weight, OptionalTensor norm_bias,
                             OptionalTensor scale, OptionalTensor seed, double scale_value,
                             double norm_eps, double dropout, int64_t activation,
                             int64_t compute_dtype, int64_t out_dtype, bool add_x) {
  BottleneckBackward args;
  Marshal m(dy, args.rows);
  marshal(m, args, dy, x, down_weight, up_weight,
          {down_bias, up_bias, norm_weight, norm_bias, scale, seed, scale_value, norm_eps, dropout,
           activation, compute_dtype, out_dtype});
  m.rows(args.dy, dy, args.out_dtype, true, "dy");
  m.rows(args.dx, dx, args.x_dtype, false, "dx");
  m.finish();
  STD_TORCH_CHECK(!add_x || args.x_dtype == args.out_dtype,
                  "add_x: expected x and dy of one dtype");
  args.add_dy = add_x;
  args.z = m.saved(z, args.bottleneck, scalar_type(args.dtype), "z");
  args.stats = (float*)m.saved(stats, 2, ScalarType::Float, "stats");
  marshal_gradients(
      m, args,
      {d_down_weight, d_down_bias, d_up_weight, d_up_bias, d_norm_weight, d_norm_bias, d_scale}, 1);
  check_saved(args, x);
  run(args, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_backward(
    Tensor dy, Tensor x, Tensor z, Tensor stats, Tensor down_weight, OptionalTensor down_bias,
    Tensor up_weight, OptionalTensor up_bias, OptionalTensor norm_weight, OptionalTensor norm_bias,
    OptionalTensor scale, OptionalTensor seed, double scale_value, double norm_eps, double dropout,
    int64_t activation, int64_t compute_dtype, int64_t out_dtype, bool add_x, int64_t needs) {
  auto wanted = [&](int bit, const OptionalTensor& like) {
    return gradient_of(x, needs >> bit & 1, like);
  };
  OptionalTensor dx;
  if (needs & 1) dx = fresh_output(dy, x.scalar_type());
  OptionalTensor d_down_weight = wanted(1, down_weight), d_down_bias = wanted(2, down_bias);
  OptionalTensor d_up_weight = wanted(3, up_weight), d_up_bias = wanted(4, up_bias);
  OptionalTensor d_norm_weight = wanted(5, norm_weight), d_norm_bias = wanted(6, norm_bias);
  OptionalTensor d_scale = wanted(7, scale);
  bottleneck_backward_out(dx, d_down_weight, d_down_bias, d_up_weight, d_up_bias, d_norm_weight,
                          d_norm_bias, d_scale, dy, x, z, stats, down_weight, down_bias, up_weight,
                          up_bias, norm_weight, norm_bias, scale, seed, scale_value, norm_eps,
                          dropout, activation, compute_dtype, out_dtype, add_x);
  auto result = [&](const OptionalTensor& t) { return t ? *t : empty(x, {0}, x.scalar_type()); };
  return {result(dx),        result(d_down_weight), result(d_down_bias), result(d_up_weight),
          result(d_up_bias), result(d_norm_weight), result(d_norm_bias), result(d_scale)};
}

#ifndef FASTADAPTERS_SIMULATION
// After finish(): the index of the rows' adapters.
void marshal_index(Groups& groups, const Tensor& index, const Bottleneck& args) {
  int64_t rows = args.all_rows(), entries = index.numel();
  STD_TORCH_CHECK(index.is_cpu() && index.scalar_type() == ScalarType::Long &&
                      index.is_contiguous() && (entries ? rows % entries == 0 : rows == 0),
                  "index: expected a contiguous int64 tensor, one for each so many rows");
  groups.index = (const int64_t*)index.const_data_ptr();
  groups.rows_each = entries && rows ? rows / entries : 1;
}

std::tuple<Tensor, Tensor, Tensor> grouped_forward(
    Tensor x, OptionalTensor residual, Tensor down_weight, OptionalTensor down_bias,
    Tensor up_weight, OptionalTensor up_bias, OptionalTensor norm_weight, OptionalTensor norm_bias,
    OptionalTensor scale, OptionalTensor seed, Tensor index, double scale_value, double norm_eps,
    double dropout, int64_t activation, int64_t compute_dtype, int64_t out_dtype, bool add_x,
    bool save) {
  BottleneckForward args;
  Groups groups;
  Marshal m(x, args.rows);
  marshal(m, args, x, x, down_weight, up_weight,
          {down_bias, up_bias, norm_weight, norm_bias, scale, seed, scale_value, norm_eps, dropout,
           activation, compute_dtype, out_dtype},
          &groups);
  m.rows(args.residual, add_x ? OptionalTensor(x) : residual, args.out_dtype, true, "residual");
  Tensor y = fresh_output(x, scalar_type(args.out_dtype));
  m.rows(args.y, y, args.out_dtype, false, "y");
  m.finish();
  int64_t rows = args.all_rows();
  auto saved = [&](bool wanted, int64_t columns, ScalarType type) {
    return wanted ? empty(x, {rows, columns}, type) : empty(x, {0}, type);
  };
  Tensor z = saved(save, args.bottleneck, scalar_type(args.dtype));
  Tensor stats = saved(save && norm_weight, 2, ScalarType::Float);
  args.z = m.saved(z, args.bottleneck, scalar_type(args.dtype), "z");
  args.stats = (float*)m.saved(stats, 2, ScalarType::Float, "stats");
  marshal_index(groups, index, args);
  cpu::grouped_forward(args, groups, threads());
  return {y, z, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> grouped_backward(
    Tensor dy, Tensor x, Tensor z, Tensor stats, Tensor down_weight, OptionalTensor down_bias,
    Tensor up_weight, OptionalTensor up_bias, OptionalTensor norm_weight, OptionalTensor norm_bias,
    OptionalTensor scale, OptionalTensor seed, Tensor index, double scale_value, double norm_eps,
    double dropout, int64_t activation, int64_t compute_dtype, int64_t out_dtype, bool add_x,
    int64_t needs) {
  BottleneckBackward args;
  Groups groups;
  Marshal m(dy, args.rows);
  marshal(m, args, dy, x, down_weight, up_weight,
          {down_bias, up_bias, norm_weight, norm_bias, scale, seed, scale_value, norm_eps, dropout,
           activation, compute_dtype, out_dtype},
          &groups);
  OptionalTensor dx;
  if (needs & 1) dx = fresh_output(dy, x.scalar_type());
  m.rows(args.dy, dy, args.out_dtype, true, "dy");
  m.rows(args.dx, dx, args.x_dtype, false, "dx");
  m.finish();
  STD_TORCH_CHECK(!add_x || args.x_dtype == args.out_dtype,
                  "add_x: expected x and dy of one dtype");
  args.add_dy = add_x;
  args.z = m.saved(z, args.bottleneck, scalar_type(args.dtype), "z");
  args.stats = (float*)m.saved(stats, 2, ScalarType::Float, "stats");
  const OptionalTensor like[] = {down_weight, down_bias, up_weight, up_bias,
                                 norm_weight, norm_bias, scale};
  OptionalTensor gradients[7];
  for (int i = 0; i < 7; ++i) gradients[i] = gradient_of(x, needs >> (i + 1) & 1, like[i]);
  marshal_gradients(m, args, gradients, groups.adapters);
  check_saved(args, x);
  marshal_index(groups, index, args);
  cpu::grouped_backward(args, groups, threads());
  auto result = [&](const OptionalTensor& t) { return t ? *t : empty(x, {0}, x.scalar_type()); };
  const auto& g = gradients;
  return {result(dx),   result(g[0]), result(g[1]), result(g[2]),
          result(g[3]), result(g[4]), result(g[5]), result(g[6])};
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTADAPTERS_NAMESPACE, CPU, m) {
  m.impl("bottleneck_forward", TORCH_BOX(&bottleneck_forward));
  m.impl("bottleneck_backward", TORCH_BOX(&bottleneck_backward));
  m.impl("bottleneck_forward_out", TORCH_BOX(&bottleneck_forward_out));
  m.impl("bottleneck_backward_out", TORCH_BOX(&bottleneck_backward_out));
#ifndef FASTADAPTERS_SIMULATION
  m.impl("grouped_forward", TORCH_BOX(&grouped_forward));
  m.impl("grouped_backward", TORCH_BOX(&grouped_backward));
#endif
}

#if defined(FASTADAPTERS_CUDA) && !defined(FASTADAPTERS_SIMULATION)
STABLE_TORCH_LIBRARY_IMPL(FASTADAPTERS_NAMESPACE, CUDA, m) {
  m.impl("bottleneck_forward", TORCH_BOX(&bottleneck_forward));
  m.impl("bottleneck_backward", TORCH_BOX(&bottleneck_backward));
  m.impl("bottleneck_forward_out", TORCH_BOX(&bottleneck_forward_out));
  m.impl("bottleneck_backward_out", TORCH_BOX(&bottleneck_backward_out));
}
#endif

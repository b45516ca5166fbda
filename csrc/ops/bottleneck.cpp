// The bottleneck on PyTorch's stable ABI. Its schemas are defined in Python (fastadapters/ops).
#include "../cpu/bottleneck/bottleneck.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "devices.h"
#include "marshal.h"
#ifdef FASTADAPTERS_CUDA
#include "../cuda/bottleneck/bottleneck.h"
#endif

namespace {

using namespace fastadapters;
using namespace fastadapters::ops;

struct Options {
  const OptionalTensor &down_bias, &up_bias, &norm_weight, &norm_bias, &scale, &seed;
  double scale_value, norm_eps, dropout;
  int64_t activation;
};

void marshal(Marshal& m, Bottleneck& args, const Tensor& x, const Tensor& down_weight,
             const Tensor& up_weight, const Options& o) {
  STD_TORCH_CHECK(x.dim() >= 1 && down_weight.dim() == 2,
                  "expected x [..., D], down_weight [r, D]");
  int64_t d = args.dim = x.size(-1), r = args.bottleneck = down_weight.size(0);
  args.dtype = dtype_of(x);
  m.rows(args.x, x, true, "x");
  m.parameter(args.down_weight, down_weight, r * d, "down_weight");
  m.parameter(args.down_bias, o.down_bias, r, "down_bias");
  m.parameter(args.up_weight, up_weight, d * r, "up_weight");
  m.parameter(args.up_bias, o.up_bias, d, "up_bias");
  m.parameter(args.norm_weight, o.norm_weight, d, "norm_weight");
  m.parameter(args.norm_bias, o.norm_bias, d, "norm_bias");
  args.channel_scale = o.scale && (o.scale->numel() != 1 || d == 1);
  m.parameter(args.scale, o.scale, args.channel_scale ? d : 1, "scale");
  STD_TORCH_CHECK(o.activation >= 0 && o.activation <= 5, "activation: expected 0 to 5");
  args.activation = Activation(o.activation);
  args.scale_value = float(o.scale_value);
  args.norm_eps = float(o.norm_eps);
  args.dropout = o.dropout;
  args.seed = m.seed(o.seed);
}

#ifdef FASTADAPTERS_CUDA
template <class Op>
void run_cuda(const Op& args, const Tensor& x, int64_t (*workspace)(const Op*),
              int (*launch)(const Op*, bool, void*, void*)) {
  CudaStream stream(x);
  int64_t bytes = workspace(&args);
  Tensor space = empty(x, {bytes / 4}, ScalarType::Float);
  int error = launch(&args, args.dtype == Dtype::float32 && allow_tf32(),
                     bytes ? space.mutable_data_ptr() : nullptr, stream.get());
  STD_TORCH_CHECK(error == 0, "fastadapters: the CUDA kernels for D = ", args.dim,
                  ", r = ", args.bottleneck,
                  " were not launched: ", fastadapters_cuda_error_string(error));
}
#endif

void run(const BottleneckForward& args, [[maybe_unused]] const Tensor& x) {
#ifdef FASTADAPTERS_CUDA
  if (on_cuda(x)) {
    return run_cuda(args, x, &fastadapters_bottleneck_forward_cuda_workspace,
                    &fastadapters_bottleneck_forward_cuda);
  }
#endif
#ifndef FASTADAPTERS_SIMULATION
  cpu::bottleneck_forward(args, threads());
#endif
}

void run(const BottleneckBackward& args, [[maybe_unused]] const Tensor& x) {
#ifdef FASTADAPTERS_CUDA
  if (on_cuda(x)) {
    return run_cuda(args, x, &fastadapters_bottleneck_backward_cuda_workspace,
                    &fastadapters_bottleneck_backward_cuda);
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
                            bool add_x) {
  BottleneckForward args;
  Marshal m(x, args.rows);
  marshal(m, args, x, down_weight, up_weight,
          {down_bias, up_bias, norm_weight, norm_bias, scale, seed, scale_value, norm_eps, dropout,
           activation});
  m.rows(args.residual, add_x ? OptionalTensor(x) : residual, true, "residual");
  m.rows(args.y, y, false, "y");
  m.finish();
  args.z = m.saved(z, args.bottleneck, x.scalar_type(), "z");
  args.stats = (float*)m.saved(stats, 2, ScalarType::Float, "stats");
  run(args, x);
}

std::tuple<Tensor, Tensor, Tensor> bottleneck_forward(
    Tensor x, OptionalTensor residual, Tensor down_weight, OptionalTensor down_bias,
    Tensor up_weight, OptionalTensor up_bias, OptionalTensor norm_weight, OptionalTensor norm_bias,
    OptionalTensor scale, OptionalTensor seed, double scale_value, double norm_eps, double dropout,
    int64_t activation, bool add_x, bool save) {
  ScalarType type = x.scalar_type();
  int64_t d = x.size(-1), m = d ? x.numel() / d : 0, r = down_weight.size(0);
  Tensor y = fresh_output(x);
  Tensor z = save && !on_cuda(x) ? empty(x, {m, r}, type) : empty(x, {0}, type);
  Tensor stats =
      save && norm_weight ? empty(x, {m, 2}, ScalarType::Float) : empty(x, {0}, ScalarType::Float);
  bottleneck_forward_out(y, z, stats, x, residual, down_weight, down_bias, up_weight, up_bias,
                         norm_weight, norm_bias, scale, seed, scale_value, norm_eps, dropout,
                         activation, add_x);
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
                             double norm_eps, double dropout, int64_t activation, bool add_x) {
  BottleneckBackward args;
  Marshal m(x, args.rows);
  marshal(m, args, x, down_weight, up_weight,
          {down_bias, up_bias, norm_weight, norm_bias, scale, seed, scale_value, norm_eps, dropout,
           activation});
  m.rows(args.dy, dy, true, "dy");
  if (dx && dx->numel() == x.numel()) m.rows(args.dx, dx, false, "dx");
  m.finish();
  args.add_dy = add_x;
  args.z = m.saved(z, args.bottleneck, x.scalar_type(), "z");
  args.stats = (float*)m.saved(stats, 2, ScalarType::Float, "stats");
  STD_TORCH_CHECK(args.z || on_cuda(x) || !args.count(),
                  "z: expected [M, r], as saved by the forward");
  STD_TORCH_CHECK(args.stats || !norm_weight || !args.count(),
                  "stats: expected [M, 2], as saved by the forward");
  int64_t d = args.dim, r = args.bottleneck;
  m.gradient(args.d_down_weight, d_down_weight, r * d, "d_down_weight");
  m.gradient(args.d_down_bias, d_down_bias, r, "d_down_bias");
  m.gradient(args.d_up_weight, d_up_weight, d * r, "d_up_weight");
  m.gradient(args.d_up_bias, d_up_bias, d, "d_up_bias");
  m.gradient(args.d_norm_weight, d_norm_weight, d, "d_norm_weight");
  m.gradient(args.d_norm_bias, d_norm_bias, d, "d_norm_bias");
  m.gradient(args.d_scale, d_scale, args.channel_scale ? d : 1, "d_scale");
  run(args, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_backward(
    Tensor dy, Tensor x, Tensor z, Tensor stats, Tensor down_weight, OptionalTensor down_bias,
    Tensor up_weight, OptionalTensor up_bias, OptionalTensor norm_weight, OptionalTensor norm_bias,
    OptionalTensor scale, OptionalTensor seed, double scale_value, double norm_eps, double dropout,
    int64_t activation, bool add_x, int64_t needs) {
  auto gradient = [&](int bit, const OptionalTensor& like) {
    if (like && (needs >> bit & 1))
      return empty(x, like->sizes().data(), like->dim(), like->scalar_type());
    return empty(x, {0}, x.scalar_type());
  };
  Tensor dx = needs & 1 ? fresh_output(x) : empty(x, {0}, x.scalar_type());
  Tensor d_down_weight = gradient(1, down_weight), d_down_bias = gradient(2, down_bias);
  Tensor d_up_weight = gradient(3, up_weight), d_up_bias = gradient(4, up_bias);
  Tensor d_norm_weight = gradient(5, norm_weight), d_norm_bias = gradient(6, norm_bias);
  Tensor d_scale = gradient(7, scale);
  bottleneck_backward_out(dx, d_down_weight, d_down_bias, d_up_weight, d_up_bias, d_norm_weight,
                          d_norm_bias, d_scale, dy, x, z, stats, down_weight, down_bias, up_weight,
                          up_bias, norm_weight, norm_bias, scale, seed, scale_value, norm_eps,
                          dropout, activation, add_x);
  return {dx,        d_down_weight, d_down_bias, d_up_weight,
          d_up_bias, d_norm_weight, d_norm_bias, d_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTADAPTERS_NAMESPACE, CPU, m) {
  m.impl("bottleneck_forward", TORCH_BOX(&bottleneck_forward));
  m.impl("bottleneck_backward", TORCH_BOX(&bottleneck_backward));
  m.impl("bottleneck_forward_out", TORCH_BOX(&bottleneck_forward_out));
  m.impl("bottleneck_backward_out", TORCH_BOX(&bottleneck_backward_out));
}

#if defined(FASTADAPTERS_CUDA) && !defined(FASTADAPTERS_SIMULATION)
STABLE_TORCH_LIBRARY_IMPL(FASTADAPTERS_NAMESPACE, CUDA, m) {
  m.impl("bottleneck_forward", TORCH_BOX(&bottleneck_forward));
  m.impl("bottleneck_backward", TORCH_BOX(&bottleneck_backward));
  m.impl("bottleneck_forward_out", TORCH_BOX(&bottleneck_forward_out));
  m.impl("bottleneck_backward_out", TORCH_BOX(&bottleneck_backward_out));
}
#endif

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
  double scale_value, norm_eps, dropout, input_dropout;
  int64_t activation, compute_dtype, out_dtype;
  bool add_x;
};

// `like` has the row dimensions of x, which may be empty in backward. Parameters of `groups` are
// stacked.
void marshal(Marshal& m, Bottleneck& args, const Tensor& like, const Tensor& x,
             const Tensor& down_weight, const Tensor& up_weight, const Options& o, Groups* groups) {
  int64_t dims = groups ? 3 : 2;
  STD_TORCH_CHECK(like.dim() >= 1 && down_weight.dim() == dims && up_weight.dim() == dims,
                  "expected x [..., D_in], down_weight [r, D_in], up_weight [D_out, r], or stacked "
                  "[N, r, D_in] and [N, D_out, r]");
  args.dim = down_weight.size(-1);
  args.out_dim = up_weight.size(-2);
  args.bottleneck = down_weight.size(-2);
  int64_t n = groups ? groups->adapters = down_weight.size(0) : 1;
  args.dtype = dtype_of(o.compute_dtype);
  args.x_dtype = dtype_of(x);
  args.out_dtype = dtype_of(o.out_dtype);
  for (Dtype stored : {args.x_dtype, args.out_dtype})
    STD_TORCH_CHECK(stored == args.dtype || stored == Dtype::float32,
                    "expected x and y in the dtype of the products or in float32");
  bool absent = x.numel() == 0 && like.numel() != 0;
  m.rows(args.x, absent ? OptionalTensor() : OptionalTensor(x), args.dim, args.x_dtype, true, "x");
  args.channel_scale = o.scale && (o.scale->numel() != n || args.out_dim == 1);
  const OptionalTensor given[] = {down_weight,   o.down_bias, up_weight, o.up_bias,
                                  o.norm_weight, o.norm_bias, o.scale};
  const auto kinds = parameter_kinds(args);
  for (size_t i = 0; i < kinds.size(); ++i)
    m.parameter(args.*kinds[i].parameter, given[i], n * kinds[i].size, kinds[i].name);
  STD_TORCH_CHECK(o.activation >= 0 && o.activation <= 5, "activation: expected 0 to 5");
  args.activation = Activation(o.activation);
  args.scale_value = float(o.scale_value);
  args.norm_eps = float(o.norm_eps);
  args.dropout = o.dropout;
  args.input_dropout = o.input_dropout;
  args.seed = m.seed(o.seed);
}

// What the forward fills; z and stats may be absent, or empty.
struct Outputs {
  const Tensor& y;
  const OptionalTensor &z, &stats;
};

void marshal_forward(Marshal& m, BottleneckForward& args, const Outputs& outputs, const Tensor& x,
                     const OptionalTensor& residual, const Tensor& down_weight,
                     const Tensor& up_weight, const Options& o, Groups* groups = nullptr) {
  marshal(m, args, x, x, down_weight, up_weight, o, groups);
  m.rows(args.residual, o.add_x ? OptionalTensor(x) : residual, args.out_dim, args.out_dtype, true,
         "residual");
  m.rows(args.y, outputs.y, args.out_dim, args.out_dtype, false, "y");
  m.finish();
  args.z = m.saved(outputs.z, args.bottleneck, scalar_type(args.dtype), "z");
  args.stats = (float*)m.saved(outputs.stats, 2, ScalarType::Float, "stats");
}

// The shape of x with another number of columns.
std::vector<int64_t> with_columns(const Tensor& x, int64_t columns) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = columns;
  return sizes;
}

// y, z and stats; what the gradient does not read is empty.
std::tuple<Tensor, Tensor, Tensor> allocate(const Tensor& x, const Tensor& down_weight,
                                            const Tensor& up_weight, const Options& o, bool save_z,
                                            bool save_stats) {
  STD_TORCH_CHECK(x.dim() >= 1 && down_weight.dim() >= 2 && up_weight.dim() >= 2,
                  "expected x [..., D_in], down_weight [r, D_in], up_weight [D_out, r]");
  ScalarType type = scalar_type(dtype_of(o.compute_dtype));
  int64_t d = x.size(-1), m = d ? x.numel() / d : 0;
  auto saved = [&](bool wanted, int64_t columns, ScalarType dtype) {
    return wanted ? empty(x, {m, columns}, dtype) : empty(x, {0}, dtype);
  };
  return {empty(x, with_columns(x, up_weight.size(-2)), scalar_type(dtype_of(o.out_dtype))),
          saved(save_z, down_weight.size(-2), type),
          saved(save_stats && o.norm_weight, 2, ScalarType::Float)};
}

// What backward fills: the gradients that are wanted, shaped like what they are of.
struct Gradients {
  OptionalTensor dx, parameters[7];  // in the order of parameter_kinds
};

// Of what is there and has its bit in `needs`.
Gradients allocate(const Tensor& dy, const Tensor& x, const Tensor& down_weight,
                   const Tensor& up_weight, const Options& o, int64_t needs) {
  const OptionalTensor like[] = {down_weight,   o.down_bias, up_weight, o.up_bias,
                                 o.norm_weight, o.norm_bias, o.scale};
  Gradients gradients;
  if (needs & 1) gradients.dx = empty(dy, with_columns(dy, down_weight.size(-1)), x.scalar_type());
  for (int i = 0; i < 7; ++i)
    if (like[i] && needs >> (i + 1) & 1)
      gradients.parameters[i] = empty(*like[i], like[i]->sizes(), like[i]->scalar_type());
  return gradients;
}

void marshal_backward(Marshal& m, BottleneckBackward& args, const Gradients& gradients,
                      const Tensor& dy, const Tensor& x, const OptionalTensor& z,
                      const OptionalTensor& stats, const Tensor& down_weight,
                      const Tensor& up_weight, const Options& o, Groups* groups = nullptr) {
  marshal(m, args, dy, x, down_weight, up_weight, o, groups);
  m.rows(args.dy, dy, args.out_dim, args.out_dtype, true, "dy");
  m.rows(args.dx, gradients.dx, args.dim, args.x_dtype, false, "dx");
  m.finish();
  STD_TORCH_CHECK(!o.add_x || (args.x_dtype == args.out_dtype && args.dim == args.out_dim),
                  "add_x: expected x and dy of one dtype and shape");
  args.add_dy = o.add_x;
  args.z = m.saved(z, args.bottleneck, scalar_type(args.dtype), "z");
  args.stats = (float*)m.saved(stats, 2, ScalarType::Float, "stats");
  int64_t n = groups ? groups->adapters : 1;
  const auto kinds = parameter_kinds(args);
  for (size_t i = 0; i < kinds.size(); ++i)
    m.gradient(args.*kinds[i].gradient, gradients.parameters[i], n * kinds[i].size,
               kinds[i].gradient_name);
  // What backward has to be given, as it was saved.
  bool none = !args.count(), again = on_cuda(x) && args.norm_weight.data;  // z, of x
  STD_TORCH_CHECK(none || args.x.data || !(args.needs_x() || (again && args.needs_z())),
                  "x: expected its values");
  STD_TORCH_CHECK(none || args.z || again || !args.needs_z(),
                  "z: expected [M, r], as saved by the forward");
  STD_TORCH_CHECK(none || args.stats || !args.norm_weight.data || !args.needs_x(),
                  "stats: expected [M, 2], as saved by the forward");
}

using AllGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Empty in place of what is absent.
AllGradients results(const Gradients& gradients, const Tensor& x) {
  auto result = [&](const OptionalTensor& t) { return t ? *t : empty(x, {0}, x.scalar_type()); };
  const auto& g = gradients.parameters;
  return {result(gradients.dx), result(g[0]), result(g[1]), result(g[2]),
          result(g[3]),         result(g[4]), result(g[5]), result(g[6])};
}

void bottleneck_forward_out(Tensor y, OptionalTensor z, OptionalTensor stats, Tensor x,
                            OptionalTensor residual, Tensor down_weight, OptionalTensor down_bias,
                            Tensor up_weight, OptionalTensor up_bias, OptionalTensor norm_weight,
                            OptionalTensor norm_bias, OptionalTensor scale, OptionalTensor seed,
                            double scale_value, double norm_eps, double dropout,
                            double input_dropout, int64_t activation, int64_t compute_dtype,
                            int64_t out_dtype, bool add_x) {
  BottleneckForward args;
  Marshal m(x, args.rows);
  marshal_forward(m, args, {y, z, stats}, x, residual, down_weight, up_weight,
                  {down_bias, up_bias, norm_weight, norm_bias, scale, seed, scale_value, norm_eps,
                   dropout, input_dropout, activation, compute_dtype, out_dtype, add_x});
  run(args, x, args.dtype == Dtype::float32, FASTADAPTERS_KERNELS(bottleneck_forward));
}

std::tuple<Tensor, Tensor, Tensor> bottleneck_forward(
    Tensor x, OptionalTensor residual, Tensor down_weight, OptionalTensor down_bias,
    Tensor up_weight, OptionalTensor up_bias, OptionalTensor norm_weight, OptionalTensor norm_bias,
    OptionalTensor scale, OptionalTensor seed, double scale_value, double norm_eps, double dropout,
    double input_dropout, int64_t activation, int64_t compute_dtype, int64_t out_dtype, bool add_x,
    bool save) {
  Options o{down_bias, up_bias, norm_weight,   norm_bias,  scale,         seed,      scale_value,
            norm_eps,  dropout, input_dropout, activation, compute_dtype, out_dtype, add_x};
  bool save_z = save && !(on_cuda(x) && norm_weight);
  auto [y, z, stats] = allocate(x, down_weight, up_weight, o, save_z, save);
  BottleneckForward args;
  Marshal m(x, args.rows);
  marshal_forward(m, args, {y, z, stats}, x, residual, down_weight, up_weight, o);
  run(args, x, args.dtype == Dtype::float32, FASTADAPTERS_KERNELS(bottleneck_forward));
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
                             double norm_eps, double dropout, double input_dropout,
                             int64_t activation, int64_t compute_dtype, int64_t out_dtype,
                             bool add_x) {
  BottleneckBackward args;
  Marshal m(dy, args.rows);
  marshal_backward(
      m, args,
      {dx,
       {d_down_weight, d_down_bias, d_up_weight, d_up_bias, d_norm_weight, d_norm_bias, d_scale}},
      dy, x, z, stats, down_weight, up_weight,
      {down_bias, up_bias, norm_weight, norm_bias, scale, seed, scale_value, norm_eps, dropout,
       input_dropout, activation, compute_dtype, out_dtype, add_x});
  run(args, x, args.dtype == Dtype::float32, FASTADAPTERS_KERNELS(bottleneck_backward));
}

AllGradients bottleneck_backward(Tensor dy, Tensor x, Tensor z, Tensor stats, Tensor down_weight,
                                 OptionalTensor down_bias, Tensor up_weight, OptionalTensor up_bias,
                                 OptionalTensor norm_weight, OptionalTensor norm_bias,
                                 OptionalTensor scale, OptionalTensor seed, double scale_value,
                                 double norm_eps, double dropout, double input_dropout,
                                 int64_t activation, int64_t compute_dtype, int64_t out_dtype,
                                 bool add_x, int64_t needs) {
  Options o{down_bias, up_bias, norm_weight,   norm_bias,  scale,         seed,      scale_value,
            norm_eps,  dropout, input_dropout, activation, compute_dtype, out_dtype, add_x};
  Gradients gradients = allocate(dy, x, down_weight, up_weight, o, needs);
  BottleneckBackward args;
  Marshal m(dy, args.rows);
  marshal_backward(m, args, gradients, dy, x, z, stats, down_weight, up_weight, o);
  run(args, x, args.dtype == Dtype::float32, FASTADAPTERS_KERNELS(bottleneck_backward));
  return results(gradients, x);
}

// After finish(): the index of the rows' adapters.
void marshal_index(Groups& groups, const Tensor& index, const Tensor& x, const Bottleneck& args) {
  int64_t rows = args.all_rows(), entries = index.numel();
  STD_TORCH_CHECK(same_device(index, x) && index.scalar_type() == ScalarType::Long &&
                      index.is_contiguous() && (entries ? rows % entries == 0 : rows == 0),
                  "index: expected a contiguous int64 tensor on x's device, one for each so many "
                  "rows");
  groups.index = (const int64_t*)index.const_data_ptr();
  groups.rows_each = entries && rows ? rows / entries : 1;
}

std::tuple<Tensor, Tensor, Tensor> grouped_forward(
    Tensor x, OptionalTensor residual, Tensor down_weight, OptionalTensor down_bias,
    Tensor up_weight, OptionalTensor up_bias, OptionalTensor norm_weight, OptionalTensor norm_bias,
    OptionalTensor scale, OptionalTensor seed, Tensor index, double scale_value, double norm_eps,
    double dropout, double input_dropout, int64_t activation, int64_t compute_dtype,
    int64_t out_dtype, bool add_x, bool save) {
  Options o{down_bias, up_bias, norm_weight,   norm_bias,  scale,         seed,      scale_value,
            norm_eps,  dropout, input_dropout, activation, compute_dtype, out_dtype, add_x};
  bool save_z = save && !(on_cuda(x) && norm_weight);
  auto [y, z, stats] = allocate(x, down_weight, up_weight, o, save_z, save);
  GroupedForward args;
  Marshal m(x, args.rows);
  marshal_forward(m, args, {y, z, stats}, x, residual, down_weight, up_weight, o, &args.groups);
  marshal_index(args.groups, index, x, args);
  run(args, x, args.dtype == Dtype::float32, FASTADAPTERS_KERNELS(grouped_forward));
  return {y, z, stats};
}

AllGradients grouped_backward(Tensor dy, Tensor x, Tensor z, Tensor stats, Tensor down_weight,
                              OptionalTensor down_bias, Tensor up_weight, OptionalTensor up_bias,
                              OptionalTensor norm_weight, OptionalTensor norm_bias,
                              OptionalTensor scale, OptionalTensor seed, Tensor index,
                              double scale_value, double norm_eps, double dropout,
                              double input_dropout, int64_t activation, int64_t compute_dtype,
                              int64_t out_dtype, bool add_x, int64_t needs) {
  Options o{down_bias, up_bias, norm_weight,   norm_bias,  scale,         seed,      scale_value,
            norm_eps,  dropout, input_dropout, activation, compute_dtype, out_dtype, add_x};
  Gradients gradients = allocate(dy, x, down_weight, up_weight, o, needs);
  GroupedBackward args;
  Marshal m(dy, args.rows);
  marshal_backward(m, args, gradients, dy, x, z, stats, down_weight, up_weight, o, &args.groups);
  marshal_index(args.groups, index, dy, args);
  run(args, x, args.dtype == Dtype::float32, FASTADAPTERS_KERNELS(grouped_backward));
  return results(gradients, x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTADAPTERS_NAMESPACE, CPU, m) {
  m.impl("bottleneck_forward", TORCH_BOX(&bottleneck_forward));
  m.impl("bottleneck_backward", TORCH_BOX(&bottleneck_backward));
  m.impl("bottleneck_forward_out", TORCH_BOX(&bottleneck_forward_out));
  m.impl("bottleneck_backward_out", TORCH_BOX(&bottleneck_backward_out));
  m.impl("grouped_forward", TORCH_BOX(&grouped_forward));
  m.impl("grouped_backward", TORCH_BOX(&grouped_backward));
}

#if defined(FASTADAPTERS_CUDA) && !defined(FASTADAPTERS_SIMULATION)
STABLE_TORCH_LIBRARY_IMPL(FASTADAPTERS_NAMESPACE, CUDA, m) {
  m.impl("bottleneck_forward", TORCH_BOX(&bottleneck_forward));
  m.impl("bottleneck_backward", TORCH_BOX(&bottleneck_backward));
  m.impl("bottleneck_forward_out", TORCH_BOX(&bottleneck_forward_out));
  m.impl("bottleneck_backward_out", TORCH_BOX(&bottleneck_backward_out));
  m.impl("grouped_forward", TORCH_BOX(&grouped_forward));
  m.impl("grouped_backward", TORCH_BOX(&grouped_backward));
}
#endif

// The ops on PyTorch's stable ABI: tensors in, raw pointers out. The schemas are defined in Python
// (fastadapters/ops); friendly messages for bad arguments too, the checks here are for memory
// safety.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/isa.h"
#ifdef FASTADAPTERS_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "cuda/bottleneck.h"

// In PyTorch's CUDA half, so absent from a CPU build of it.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

#ifndef FASTADAPTERS_NAMESPACE
#define FASTADAPTERS_NAMESPACE fastadapters
#endif

namespace {

using namespace fastadapters;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Dtype dtype_of(const Tensor& t) {
  ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
      "expected a float32, bfloat16 or float16 tensor");
  return type == ScalarType::Float      ? Dtype::float32
         : type == ScalarType::BFloat16 ? Dtype::bfloat16
                                        : Dtype::float16;
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// Arguments as the kernels want them. Copies made on the way live as long as this does.
class Marshal {
 public:
  Marshal(Bottleneck& args, const Tensor& x) : args_(args), x_(x) {}

  void parameter(Parameter& p, const OptionalTensor& t, int64_t numel, const char* name) {
    if (!t) return;
    Tensor c = t->is_contiguous() ? *t : torch::stable::contiguous(*t);
    fill(p, c, const_cast<void*>(c.const_data_ptr()), numel, name);
    kept_.push_back(std::move(c));
  }

  // An absent or empty tensor is a gradient nobody wants.
  void gradient(Parameter& p, const OptionalTensor& t, int64_t numel, const char* name) {
    if (!t || (t->numel() == 0 && numel != 0)) return;
    STD_TORCH_CHECK(t->is_contiguous(), name, ": expected a contiguous tensor");
    fill(p, *t, t->mutable_data_ptr(), numel, name);
  }

  // z, stats
  void* saved(const OptionalTensor& t, int64_t columns, ScalarType type, const char* name) {
    if (!t || (t->numel() == 0 && columns * args_.count() != 0)) return nullptr;
    STD_TORCH_CHECK(same_device(*t, x_) && t->is_contiguous() && t->scalar_type() == type &&
                        t->numel() == columns * args_.count(),
                    name, ": expected a contiguous tensor [M, ", columns, "] on x's device");
    return t->mutable_data_ptr();
  }

  // Tensors of x's shape. `input` ones are copied if the kernels cannot read them in place.
  void rows(Rows& rows, const OptionalTensor& t, bool input, const char* name) {
    if (!t) return;
    Tensor view = *t;
    STD_TORCH_CHECK(same_device(view, x_) && dtype_of(view) == args_.dtype, name,
                    ": expected a tensor of x's dtype on x's device");
    if (view.dim() > 0 && view.size(-1) > 1 && view.stride(-1) != 1) {
      STD_TORCH_CHECK(input, name, ": expected a tensor whose last dimension has stride 1");
      view = torch::stable::contiguous(view);
    }
    views_.push_back({&rows, view, input, name});
  }

  // Merges the row dimensions that are one in every tensor.
  void finish() {
    const Tensor& x = views_[0].tensor;
    auto shape = x.sizes();
    for (View& v : views_) {
      auto sizes = v.tensor.sizes();
      bool same = sizes.size() == shape.size();
      for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape[i];
      STD_TORCH_CHECK(same, v.name, ": expected the shape of x");
    }
    if (!merge())
      for (View& v : views_)
        if (v.input) v.tensor = torch::stable::contiguous(v.tensor);
    STD_TORCH_CHECK(merge(), "expected outputs with at most three dimensions of rows");
    for (View& v : views_)
      v.rows->data =
          v.input ? const_cast<void*>(v.tensor.const_data_ptr()) : v.tensor.mutable_data_ptr();
  }

 private:
  struct View {
    Rows* rows;
    Tensor tensor;
    bool input;
    const char* name;
  };

  void fill(Parameter& p, const Tensor& t, void* data, int64_t numel, const char* name) {
    STD_TORCH_CHECK(same_device(t, x_) && t.numel() == numel, name, ": expected a tensor with ",
                    numel, " elements on x's device");
    p = {data, dtype_of(t)};
  }

  bool merge() {
    int used = 0;
    int64_t* shape = args_.rows;
    shape[0] = shape[1] = shape[2] = 1;
    for (View& v : views_) std::memset(v.rows->strides, 0, sizeof v.rows->strides);
    for (int64_t dim = views_[0].tensor.dim() - 2; dim >= 0; --dim) {
      int64_t size = views_[0].tensor.size(dim);
      if (size == 1) continue;
      bool mergeable = used > 0;
      for (View& v : views_)
        mergeable &= v.tensor.stride(dim) == v.rows->strides[3 - used] * shape[3 - used];
      if (mergeable) {
        shape[3 - used] *= size;
        continue;
      }
      if (++used > 3) return false;
      shape[3 - used] = size;
      for (View& v : views_) v.rows->strides[3 - used] = v.tensor.stride(dim);
    }
    return true;
  }

  Bottleneck& args_;
  const Tensor& x_;
  std::vector<Tensor> kept_;
  std::vector<View> views_;
};

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
  if (o.seed) {
    STD_TORCH_CHECK(same_device(*o.seed, x) && o.seed->scalar_type() == ScalarType::Long &&
                        o.seed->is_contiguous() && o.seed->numel() == 2,
                    "seed: expected a contiguous int64 tensor [2] on x's device");
    args.seed = (const int64_t*)o.seed->const_data_ptr();
  }
}

[[maybe_unused]] cpu::Threads threads() {
  auto run = [](int64_t n, void (*body)(int64_t, void*), void* context) {
    torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i, context);
    });
  };
  return {int(torch::stable::get_num_threads()), run};
}

Tensor empty(const Tensor& like, const int64_t* sizes, int64_t dim, ScalarType type) {
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
      aoti_torch_empty_strided(dim, sizes, strides.data(), dtype, device,
                               like.is_cpu() ? 0 : like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return empty(like, sizes.begin(), int64_t(sizes.size()), type);
}

// A large fresh output costs more in page faults than in stores: ask for huge pages.
Tensor fresh_output(const Tensor& x) {
  Tensor y = empty(x, x.sizes().data(), x.dim(), x.scalar_type());
#if defined(__linux__)
  static const bool wanted = [] {
    const char* value = std::getenv("FASTADAPTERS_HUGEPAGES");
    return !value || std::strcmp(value, "0") != 0;
  }();
  constexpr size_t least = 4 << 20, page = 4096;
  size_t bytes = size_t(y.numel()) * y.element_size();
  if (wanted && x.is_cpu() && bytes >= least) {
    size_t begin = ((size_t)y.mutable_data_ptr() + page - 1) / page * page;
    size_t end = ((size_t)y.mutable_data_ptr() + bytes) / page * page;
    madvise((void*)begin, end - begin, MADV_HUGEPAGE);
  }
#endif
  return y;
}

// The CUDA kernels run on CUDA tensors; in a simulation of a GPU, which tests build, on all.
bool on_cuda(const Tensor& x) {
#ifdef FASTADAPTERS_SIMULATION
  return x.defined();
#else
  return !x.is_cpu();
#endif
}

#ifdef FASTADAPTERS_CUDA
// PyTorch's setting is not on the stable ABI, but Python knows it (fastadapters/ops).
bool allow_tf32(const Bottleneck& args) {
  if (args.dtype != Dtype::float32) return false;
  StableIValue result = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_call_dispatcher("fastadapters::allow_tf32", "", &result));
  return torch::stable::detail::to<bool>(result);
}

template <class Op>
void run_cuda(const Op& args, const Tensor& x, int64_t (*workspace)(const Op*),
              int (*launch)(const Op*, bool, void*, void*)) {
  void* stream = nullptr;
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (!x.is_cpu()) {
    int32_t device = x.get_device_index();
    guard.emplace(device);
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream &&
                        aoti_torch_get_current_cuda_stream(device, &stream) == 0,
                    "fastadapters: this PyTorch has no CUDA streams");
  }
  int64_t bytes = workspace(&args);
  Tensor space = empty(x, {bytes / 4}, ScalarType::Float);
  int error = launch(&args, allow_tf32(args), bytes ? space.mutable_data_ptr() : nullptr, stream);
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
  Marshal m(args, x);
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
  Marshal m(args, x);
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

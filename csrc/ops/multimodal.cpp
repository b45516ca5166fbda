// The multi-modal adapter's head on PyTorch's stable ABI. Its schemas are defined in Python
// (fastadapters/ops).
#include "../multimodal.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "run.h"
#ifndef FASTADAPTERS_SIMULATION
#include "../cpu/multimodal/multimodal.h"
#endif
#ifdef FASTADAPTERS_CUDA
#include "../cuda/multimodal/multimodal.h"
#endif

namespace {

using namespace fastadapters;
using namespace fastadapters::ops;

constexpr int kParameters = 14;

// In the order of the schema, and of the bits that ask for their gradients behind text and image.
constexpr Parameter MultimodalParameters::* members[kParameters] = {
    &MultimodalParameters::down_weight,   &MultimodalParameters::down_bias,
    &MultimodalParameters::down_weight_2, &MultimodalParameters::down_bias_2,
    &MultimodalParameters::in_weight,     &MultimodalParameters::in_bias,
    &MultimodalParameters::out_weight,    &MultimodalParameters::out_bias,
    &MultimodalParameters::up_weight,     &MultimodalParameters::up_bias,
    &MultimodalParameters::up_weight_2,   &MultimodalParameters::up_bias_2,
    &MultimodalParameters::blend,         &MultimodalParameters::logit_scale};
constexpr const char* names[kParameters] = {
    "down_weight", "down_bias",  "down_weight_2", "down_bias_2", "in_weight",
    "in_bias",     "out_weight", "out_bias",      "up_weight",   "up_bias",
    "up_weight_2", "up_bias_2",  "blend",         "logit_scale"};

struct Options {
  double blend_value, scale_value;
  int64_t num_heads;
  double bias_tt, bias_ti, bias_it, bias_ii;
  int64_t adapt, down_activation, out_dtype;
};

using Parameters = OptionalTensor[kParameters];

// The arguments of a call; copies made on the way live as long as this does.
class Arguments {
 public:
  Arguments(Multimodal& args, const Tensor& text, const Tensor& image, const Parameters& parameters,
            const Options& o)
      : marshal_(image, shape_) {
    STD_TORCH_CHECK(text.dim() == 2 && image.dim() == 2 && text.size(1) == image.size(1) &&
                        same_device(text, image),
                    "expected text [C, D] and image [B, D]");
    int64_t d = args.dim = image.size(1);
    args.texts = text.size(0);
    args.items = image.size(0);
    const Tensor &down = *parameters[0], &out = *parameters[6], &up = *parameters[8];
    STD_TORCH_CHECK(down.dim() == 2 && out.dim() == 2 && up.dim() == 2,
                    "expected weights [out, in]");
    int64_t e = args.width = out.size(0);
    args.heads = o.num_heads;
    STD_TORCH_CHECK(args.heads > 0 && e % args.heads == 0, "num_heads: expected a divisor of E");
    args.down_hidden = parameters[2] ? down.size(0) : 0;
    args.up_hidden = parameters[10] ? up.size(0) : 0;
    int64_t down_out = args.down_hidden ? args.down_hidden : e;
    int64_t up_out = args.up_hidden ? args.up_hidden : d;
    int64_t sizes[kParameters] = {
        down_out * d, down_out, e * args.down_hidden, e, 3 * e * e, 3 * e, e * e, e,
        up_out * e,   up_out,   d * args.up_hidden,   d, 1,         1};
    STD_TORCH_CHECK(
        bool(parameters[2]) == bool(parameters[3]) && bool(parameters[10]) == bool(parameters[11]),
        "expected a bias with each weight");
    for (int i = 0; i < kParameters; ++i)
      marshal_.parameter(args.parameters.*members[i], parameters[i], sizes[i], names[i]);
    args.blend_value = float(o.blend_value);
    args.rest_value = float(1 - o.blend_value);
    args.scale_value = float(o.scale_value);
    args.bias[0][0] = float(o.bias_tt);
    args.bias[0][1] = float(o.bias_ti);
    args.bias[1][0] = float(o.bias_it);
    args.bias[1][1] = float(o.bias_ii);
    STD_TORCH_CHECK(o.adapt >= 0 && o.adapt <= 2, "adapt: expected 0 to 2");
    args.adapt = Adapt(o.adapt);
    STD_TORCH_CHECK(o.down_activation >= 0 && o.down_activation <= 5,
                    "down_activation: expected 0 to 5");
    args.down_activation = Activation(o.down_activation);
    args.out_dtype = dtype_of(o.out_dtype);
    args.text = features(text, "text");
    args.image = features(image, "image");
  }

  Features features(const Tensor& t, const char* name) {
    kept_.push_back(t.size(1) > 1 && t.stride(1) != 1 ? torch::stable::contiguous(t) : t);
    const Tensor& view = kept_.back();
    return {values_of(view, name), view.stride(0), dtype_of(view)};
  }

  Marshal& parameters() { return marshal_; }

 private:
  int64_t shape_[3];
  Marshal marshal_;
  std::vector<Tensor> kept_;
};

int64_t state_of([[maybe_unused]] const Multimodal& args, [[maybe_unused]] const Tensor& image) {
#ifdef FASTADAPTERS_CUDA
  if (on_cuda(image)) return cuda::multimodal_logits_state(args);
#endif
#ifndef FASTADAPTERS_SIMULATION
  return cpu::multimodal_logits_state(args);
#endif
  return 0;
}

std::tuple<Tensor, Tensor> multimodal_logits_forward(
    Tensor text, Tensor image, Tensor down_weight, Tensor down_bias, OptionalTensor down_weight_2,
    OptionalTensor down_bias_2, Tensor in_weight, Tensor in_bias, Tensor out_weight,
    Tensor out_bias, Tensor up_weight, Tensor up_bias, OptionalTensor up_weight_2,
    OptionalTensor up_bias_2, OptionalTensor blend, OptionalTensor logit_scale, double blend_value,
    double scale_value, int64_t num_heads, double bias_tt, double bias_ti, double bias_it,
    double bias_ii, int64_t adapt, int64_t down_activation, int64_t out_dtype, bool save) {
  MultimodalForward args;
  Arguments a(args, text, image,
              {down_weight, down_bias, down_weight_2, down_bias_2, in_weight, in_bias, out_weight,
               out_bias, up_weight, up_bias, up_weight_2, up_bias_2, blend, logit_scale},
              {blend_value, scale_value, num_heads, bias_tt, bias_ti, bias_it, bias_ii, adapt,
               down_activation, out_dtype});
  Tensor logits = empty(image, {args.items, args.texts}, scalar_type(args.out_dtype));
  Tensor state = empty(image, {save ? state_of(args, image) : 0}, ScalarType::Float);
  args.logits = logits.mutable_data_ptr();
  if (state.numel()) args.state = (float*)state.mutable_data_ptr();
  run(args, image, true, FASTADAPTERS_KERNELS(multimodal_logits_forward));
  return {logits, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor, Tensor, Tensor, Tensor, Tensor>
multimodal_logits_backward(Tensor d_logits, Tensor text, Tensor state, Tensor image,
                           Tensor down_weight, Tensor down_bias, OptionalTensor down_weight_2,
                           OptionalTensor down_bias_2, Tensor in_weight, Tensor in_bias,
                           Tensor out_weight, Tensor out_bias, Tensor up_weight, Tensor up_bias,
                           OptionalTensor up_weight_2, OptionalTensor up_bias_2,
                           OptionalTensor blend, OptionalTensor logit_scale, double blend_value,
                           double scale_value, int64_t num_heads, double bias_tt, double bias_ti,
                           double bias_it, double bias_ii, int64_t adapt, int64_t down_activation,
                           int64_t out_dtype, int64_t needs) {
  MultimodalBackward args;
  const Parameters parameters = {down_weight, down_bias,  down_weight_2, down_bias_2, in_weight,
                                 in_bias,     out_weight, out_bias,      up_weight,   up_bias,
                                 up_weight_2, up_bias_2,  blend,         logit_scale};
  Arguments a(args, text, image, parameters,
              {blend_value, scale_value, num_heads, bias_tt, bias_ti, bias_it, bias_ii, adapt,
               down_activation, out_dtype});
  STD_TORCH_CHECK(
      d_logits.dim() == 2 && d_logits.size(0) == args.items && d_logits.size(1) == args.texts &&
          d_logits.scalar_type() == scalar_type(args.out_dtype) && same_device(d_logits, image),
      "d_logits: expected a tensor [B, C] like the logits");
  Tensor given = d_logits.is_contiguous() ? d_logits : torch::stable::contiguous(d_logits);
  args.d_logits = given.const_data_ptr();
  STD_TORCH_CHECK(state.is_contiguous() && state.scalar_type() == ScalarType::Float &&
                      same_device(state, image) && state.numel() == state_of(args, image),
                  "state: expected what the forward saved");
  if (state.numel()) args.state = (float*)state.mutable_data_ptr();

  Tensor results[2 + kParameters];
  for (int i = 0; i < 2 + kParameters; ++i) {
    const OptionalTensor like = i == 0 ? text : i == 1 ? image : parameters[i - 2];
    bool wanted = like && needs >> i & 1;
    results[i] = wanted ? empty(*like, like->sizes(), like->scalar_type())
                        : empty(image, {0}, image.scalar_type());
    if (!wanted) continue;
    if (i < 2)
      (i ? args.d_image : args.d_text) = {results[i].mutable_data_ptr(), args.dim,
                                          dtype_of(results[i])};
    else
      a.parameters().gradient(args.gradients.*members[i - 2], results[i], like->numel(),
                              names[i - 2]);
  }
  run(args, image, true, FASTADAPTERS_KERNELS(multimodal_logits_backward));
  return {results[0],  results[1],  results[2],  results[3], results[4],  results[5],
          results[6],  results[7],  results[8],  results[9], results[10], results[11],
          results[12], results[13], results[14], results[15]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTADAPTERS_NAMESPACE, CPU, m) {
  m.impl("multimodal_logits_forward", TORCH_BOX(&multimodal_logits_forward));
  m.impl("multimodal_logits_backward", TORCH_BOX(&multimodal_logits_backward));
}

#if defined(FASTADAPTERS_CUDA) && !defined(FASTADAPTERS_SIMULATION)
STABLE_TORCH_LIBRARY_IMPL(FASTADAPTERS_NAMESPACE, CUDA, m) {
  m.impl("multimodal_logits_forward", TORCH_BOX(&multimodal_logits_forward));
  m.impl("multimodal_logits_backward", TORCH_BOX(&multimodal_logits_backward));
}
#endif

// Cross-modal attention on PyTorch's stable ABI. Its schemas are defined in Python
// (fastadapters/ops).
#include "../cross_modal_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "run.h"
#ifndef FASTADAPTERS_SIMULATION
#include "../cpu/cross_modal_attention/cross_modal_attention.h"
#endif
#ifdef FASTADAPTERS_CUDA
#include "../cuda/cross_modal_attention/cross_modal_attention.h"
#endif

namespace {

using namespace fastadapters;
using namespace fastadapters::ops;

using Six = Tensor[6];
constexpr const char* names[6] = {"text_q", "text_k", "text_v", "image_q", "image_k", "image_v"};

struct Options {
  double scale, bias_tt, bias_ti, bias_it, bias_ii;
  int64_t outputs;
};

// -inf blocks; what else is beyond 1e30 decides alone, and stays finite in fp32.
float finite_or_blocked(double bias) {
  return bias == -INFINITY ? -INFINITY : float(std::fmin(std::fmax(bias, -1e30), 1e30));
}

Heads& at(Attended& text, Attended& image, int i) {
  Attended& of = i < 3 ? text : image;
  return i % 3 == 0 ? of.q : i % 3 == 1 ? of.k : of.v;
}

// [B, tokens, H, d], or [tokens, H, d] that all items share.
Heads heads(const Tensor& t, const void* data) {
  int64_t first = t.dim() - 3;
  return {const_cast<void*>(data), first ? t.stride(0) : 0, t.stride(first), t.stride(first + 1)};
}

// The arguments of a call; copies made on the way live as long as this does.
class Arguments {
 public:
  Arguments(CrossModalAttention& args, const Six& tensors, const Options& o) {
    const Tensor &text = tensors[0], &image = tensors[3];
    STD_TORCH_CHECK(image.dim() == 4 && (text.dim() == 3 || text.dim() == 4),
                    "expected text [C, H, d] or [B, C, H, d], image [B, I, H, d]");
    args.dtype = dtype_of(image);
    args.items = image.size(0);
    args.images = image.size(1);
    args.heads = image.size(2);
    args.width = image.size(3);
    args.shared = text.dim() == 3;
    args.texts = text.size(-3);
    args.scale = float(o.scale);
    args.bias[0][0] = finite_or_blocked(o.bias_tt);
    args.bias[0][1] = finite_or_blocked(o.bias_ti);
    args.bias[1][0] = finite_or_blocked(o.bias_it);
    args.bias[1][1] = finite_or_blocked(o.bias_ii);
    for (int i = 0; i < 6; ++i)
      at(args.text, args.image, i) = read(args, tensors[i], i < 3, names[i]);
  }

  // A tensor of the shape of the text or of the image tokens of every item.
  Heads read_gradient(const CrossModalAttention& args, const OptionalTensor& t, bool text,
                      const char* name) {
    if (!t) return {};
    STD_TORCH_CHECK(t->dim() == 4, name, ": expected [B, tokens, H, d]");
    return read(args, *t, text, name);
  }

 private:
  Heads read(const CrossModalAttention& args, const Tensor& t, bool text, const char* name) {
    int64_t first = t.dim() - 3;
    STD_TORCH_CHECK((first == 1 || (first == 0 && text && args.shared)) &&
                        (!first || t.size(0) == args.items) &&
                        t.size(first) == (text ? args.texts : args.images) &&
                        t.size(first + 1) == args.heads && t.size(first + 2) == args.width &&
                        t.scalar_type() == scalar_type(args.dtype),
                    name, ": expected a tensor of another shape or dtype");
    kept_.push_back(args.width > 1 && t.stride(-1) != 1 ? torch::stable::contiguous(t) : t);
    return heads(kept_.back(), values_of(kept_.back(), name));
  }

  std::vector<Tensor> kept_;
};

int64_t state_of([[maybe_unused]] const CrossModalAttention& args,
                 [[maybe_unused]] const Tensor& image) {
#ifdef FASTADAPTERS_CUDA
  if (on_cuda(image)) return cuda::cross_modal_attention_state(args);
#endif
#ifndef FASTADAPTERS_SIMULATION
  return cpu::cross_modal_attention_state(args);
#endif
  return 0;
}

std::tuple<Tensor, Tensor, Tensor> cross_modal_attention_forward(
    Tensor text_q, Tensor text_k, Tensor text_v, Tensor image_q, Tensor image_k, Tensor image_v,
    double scale, double bias_tt, double bias_ti, double bias_it, double bias_ii, int64_t outputs,
    bool save) {
  CrossModalAttentionForward args;
  Arguments a(args, {text_q, text_k, text_v, image_q, image_k, image_v},
              {scale, bias_tt, bias_ti, bias_it, bias_ii, outputs});
  auto result = [&](bool wanted, int64_t tokens, Heads& to) {
    ScalarType type = scalar_type(args.dtype);
    Tensor t = wanted ? empty(image_q, {args.items, tokens, args.heads, args.width}, type)
                      : empty(image_q, {0}, type);
    if (wanted) to = heads(t, t.mutable_data_ptr());
    return t;
  };
  Tensor text_out = result(outputs & 1, args.texts, args.text_out);
  Tensor image_out = result(outputs & 2, args.images, args.image_out);
  Tensor state = empty(image_q, {save ? state_of(args, image_q) : 0}, ScalarType::Float);
  if (state.numel()) args.state = (float*)state.mutable_data_ptr();
  run(args, image_q, args.dtype == Dtype::float32,
      FASTADAPTERS_KERNELS(cross_modal_attention_forward));
  return {text_out, image_out, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_modal_attention_backward(
    OptionalTensor d_text_out, OptionalTensor d_image_out, Tensor text_q, Tensor text_k,
    Tensor text_v, Tensor image_q, Tensor image_k, Tensor image_v, Tensor state, double scale,
    double bias_tt, double bias_ti, double bias_it, double bias_ii, int64_t outputs,
    int64_t needs) {
  CrossModalAttentionBackward args;
  const Six tensors = {text_q, text_k, text_v, image_q, image_k, image_v};
  Arguments a(args, tensors, {scale, bias_tt, bias_ti, bias_it, bias_ii, outputs});
  args.d_text_out = a.read_gradient(args, d_text_out, true, "d_text_out");
  args.d_image_out = a.read_gradient(args, d_image_out, false, "d_image_out");
  STD_TORCH_CHECK(state.is_contiguous() && state.scalar_type() == ScalarType::Float &&
                      same_device(state, image_q) && state.numel() == state_of(args, image_q),
                  "state: expected what the forward saved");
  if (state.numel()) args.state = (float*)state.mutable_data_ptr();
  Six results;
  for (int i = 0; i < 6; ++i) {
    bool wanted = needs >> i & 1;
    results[i] = wanted ? empty(tensors[i], tensors[i].sizes(), tensors[i].scalar_type())
                        : empty(image_q, {0}, image_q.scalar_type());
    if (wanted) at(args.d_text, args.d_image, i) = heads(results[i], results[i].mutable_data_ptr());
  }
  run(args, image_q, args.dtype == Dtype::float32,
      FASTADAPTERS_KERNELS(cross_modal_attention_backward));
  return {results[0], results[1], results[2], results[3], results[4], results[5]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTADAPTERS_NAMESPACE, CPU, m) {
  m.impl("cross_modal_attention_forward", TORCH_BOX(&cross_modal_attention_forward));
  m.impl("cross_modal_attention_backward", TORCH_BOX(&cross_modal_attention_backward));
}

#if defined(FASTADAPTERS_CUDA) && !defined(FASTADAPTERS_SIMULATION)
STABLE_TORCH_LIBRARY_IMPL(FASTADAPTERS_NAMESPACE, CUDA, m) {
  m.impl("cross_modal_attention_forward", TORCH_BOX(&cross_modal_attention_forward));
  m.impl("cross_modal_attention_backward", TORCH_BOX(&cross_modal_attention_backward));
}
#endif

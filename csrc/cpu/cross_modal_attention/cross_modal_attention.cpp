#include "cross_modal_attention.h"

#include "../isa.h"
#include "kernels.h"

namespace fastadapters::cpu {
namespace {

#if defined(__x86_64__)
constexpr auto *avx512 = &avx512_cross_modal_attention, *avx2 = &avx2_cross_modal_attention;
#else
constexpr const CrossModalAttentionKernels *avx512 = nullptr, *avx2 = nullptr;
#endif
constexpr auto* portable = &portable_cross_modal_attention;

const CrossModalAttentionKernels* const kernels[kIsas][3] = {
    {nullptr, avx512, nullptr},  // amx
    {nullptr, avx512, nullptr},  // avx512_bf16
    {avx512, avx512, avx512},   {avx2, avx2, avx2}, {portable, portable, portable},
};

}  // namespace

int64_t cross_modal_attention_state(const CrossModalAttention& p) {
  int64_t texts = p.shared ? p.texts : p.items * p.texts, images = p.items * p.images;
  return (texts + 2 * images) * p.heads * (p.width + 2);
}

void cross_modal_attention_forward(const CrossModalAttentionForward& args, const Threads& threads) {
  choose(kernels, args.dtype).forward(args, threads);
}

void cross_modal_attention_backward(const CrossModalAttentionBackward& args,
                                    const Threads& threads) {
  choose(kernels, args.dtype).backward(args, threads);
}

}  // namespace fastadapters::cpu

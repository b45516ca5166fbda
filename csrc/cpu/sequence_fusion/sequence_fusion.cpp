#include "sequence_fusion.h"

#include "../isa.h"
#include "kernels.h"

namespace fastadapters::cpu {
namespace {

const SequenceFusionKernels& kernels(Dtype dtype) {
  switch (isa(dtype)) {
#if defined(__x86_64__)
    case Isa::avx512_bf16:
      return avx512_bf16_sequence_fusion;
    case Isa::amx:
    case Isa::avx512:
      return avx512_sequence_fusion;
    case Isa::avx2:
      return avx2_sequence_fusion;
#endif
    default:
      return portable_sequence_fusion;
  }
}

}  // namespace

void sequence_fusion_forward(const SequenceFusionForward& args, const Threads& threads) {
  kernels(args.dtype).forward(args, threads);
}

void sequence_fusion_backward(const SequenceFusionBackward& args, const Threads& threads) {
  kernels(args.dtype).backward(args, threads);
}

}  // namespace fastadapters::cpu

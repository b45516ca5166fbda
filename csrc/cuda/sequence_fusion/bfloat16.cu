#include "run.cuh"

namespace fastadapters::cuda::fusion {

template void run<BFloat16>(const SequenceFusionForward&, Arena*, cudaStream_t);
template void run<BFloat16>(const SequenceFusionBackward&, Arena*, cudaStream_t);

}  // namespace fastadapters::cuda::fusion

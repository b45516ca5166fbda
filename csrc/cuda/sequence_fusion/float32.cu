#include "run.cuh"

namespace fastadapters::cuda::fusion {

template void run<Float32<false>>(const SequenceFusionForward&, Arena*, cudaStream_t);
template void run<Float32<false>>(const SequenceFusionBackward&, Arena*, cudaStream_t);
template void run<Float32<true>>(const SequenceFusionForward&, Arena*, cudaStream_t);
template void run<Float32<true>>(const SequenceFusionBackward&, Arena*, cudaStream_t);

}  // namespace fastadapters::cuda::fusion

#include "run.cuh"

namespace fastadapters::cuda::fusion {

template void run<Float16>(const SequenceFusionForward&, Arena*, cudaStream_t);
template void run<Float16>(const SequenceFusionBackward&, Arena*, cudaStream_t);

}  // namespace fastadapters::cuda::fusion

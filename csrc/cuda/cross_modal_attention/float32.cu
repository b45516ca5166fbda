#include "run.cuh"

namespace fastadapters::cuda::attention {

template void run<Float32<false>>(const CrossModalAttentionForward&, Arena*, cudaStream_t);
template void run<Float32<false>>(const CrossModalAttentionBackward&, Arena*, cudaStream_t);

}  // namespace fastadapters::cuda::attention

#include "run.cuh"

namespace fastadapters::cuda::attention {

template void run<BFloat16>(const CrossModalAttentionForward&, Arena*, cudaStream_t);
template void run<BFloat16>(const CrossModalAttentionBackward&, Arena*, cudaStream_t);

}  // namespace fastadapters::cuda::attention

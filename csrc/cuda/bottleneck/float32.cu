#include "run.cuh"

namespace fastadapters::cuda {

template void run<Float32<false>>(const BottleneckForward&, Arena*, cudaStream_t);
template void run<Float32<false>>(const BottleneckBackward&, Arena*, cudaStream_t);
template void run<Float32<true>>(const BottleneckForward&, Arena*, cudaStream_t);
template void run<Float32<true>>(const BottleneckBackward&, Arena*, cudaStream_t);

}  // namespace fastadapters::cuda

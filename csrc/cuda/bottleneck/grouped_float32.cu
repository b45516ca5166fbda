#include "run.cuh"

namespace fastadapters::cuda {

template void run<Float32<false>, true>(const BottleneckForward&, const Groups&, Arena*,
                                        cudaStream_t);
template void run<Float32<false>, true>(const BottleneckBackward&, const Groups&, Arena*,
                                        cudaStream_t);
template void run<Float32<true>, true>(const BottleneckForward&, const Groups&, Arena*,
                                       cudaStream_t);
template void run<Float32<true>, true>(const BottleneckBackward&, const Groups&, Arena*,
                                       cudaStream_t);

}  // namespace fastadapters::cuda

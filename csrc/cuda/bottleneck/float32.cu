#include "run.cuh"

namespace fastadapters::cuda {

template void run<Float32<false>, false>(const BottleneckForward&, const Groups&, Arena*,
                                         cudaStream_t);
template void run<Float32<false>, false>(const BottleneckBackward&, const Groups&, Arena*,
                                         cudaStream_t);
template void run<Float32<true>, false>(const BottleneckForward&, const Groups&, Arena*,
                                        cudaStream_t);
template void run<Float32<true>, false>(const BottleneckBackward&, const Groups&, Arena*,
                                        cudaStream_t);

}  // namespace fastadapters::cuda

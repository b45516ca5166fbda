#include "run.cuh"

namespace fastadapters::cuda {

template void run<Float16, false>(const BottleneckForward&, const Groups&, Arena*, cudaStream_t);
template void run<Float16, false>(const BottleneckBackward&, const Groups&, Arena*, cudaStream_t);

}  // namespace fastadapters::cuda

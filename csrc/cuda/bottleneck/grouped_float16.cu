#include "run.cuh"

namespace fastadapters::cuda {

template void run<Float16, true>(const BottleneckForward&, const Groups&, Arena*, cudaStream_t);
template void run<Float16, true>(const BottleneckBackward&, const Groups&, Arena*, cudaStream_t);

}  // namespace fastadapters::cuda

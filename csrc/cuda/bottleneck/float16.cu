#include "run.cuh"

namespace fastadapters::cuda {

template void run<Float16>(const BottleneckForward&, Arena*, cudaStream_t);
template void run<Float16>(const BottleneckBackward&, Arena*, cudaStream_t);

}  // namespace fastadapters::cuda

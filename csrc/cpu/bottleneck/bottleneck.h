// The bottleneck on the CPU.
#pragma once

#include "../../bottleneck.h"
#include "../threads.h"

namespace fastadapters::cpu {

// Throw std::invalid_argument where the instruction set asked for is unknown or not supported here.
void bottleneck_forward(const BottleneckForward& args, const Threads& threads);
void bottleneck_backward(const BottleneckBackward& args, const Threads& threads);

// Each row through its adapter. Throw std::invalid_argument also where an index is not in [0, N).
void grouped_forward(const GroupedForward& args, const Threads& threads);
void grouped_backward(const GroupedBackward& args, const Threads& threads);

}  // namespace fastadapters::cpu

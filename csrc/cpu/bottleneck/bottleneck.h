// The bottleneck on the CPU.
#pragma once

#include "../../bottleneck.h"
#include "../threads.h"

namespace fastadapters::cpu {

// Throw std::invalid_argument where the instruction set asked for is unknown or not supported here.
void bottleneck_forward(const BottleneckForward& args, const Threads& threads);
void bottleneck_backward(const BottleneckBackward& args, const Threads& threads);

// Each row through its adapter. The parameters of `args`, and their gradients, are those of the
// first adapter; the others' follow. Throw std::invalid_argument also where an index is not in [0,
// N).
void grouped_forward(const BottleneckForward& args, const Groups& groups, const Threads& threads);
void grouped_backward(const BottleneckBackward& args, const Groups& groups, const Threads& threads);

}  // namespace fastadapters::cpu

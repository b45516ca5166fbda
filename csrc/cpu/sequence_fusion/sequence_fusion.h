// Sequence fusion on the CPU.
#pragma once

#include "../../sequence_fusion.h"
#include "../threads.h"

namespace fastadapters::cpu {

// Throw std::invalid_argument where the instruction set asked for is unknown or not supported here.
void sequence_fusion_forward(const SequenceFusionForward& args, const Threads& threads);
void sequence_fusion_backward(const SequenceFusionBackward& args, const Threads& threads);

}  // namespace fastadapters::cpu

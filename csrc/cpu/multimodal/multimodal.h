// The multi-modal adapter's head on the CPU.
#pragma once

#include "../../multimodal.h"
#include "../threads.h"

namespace fastadapters::cpu {

// Floats of `state`, a function of the sizes alone.
int64_t multimodal_logits_state(const Multimodal& args);

// Throw std::invalid_argument where the instruction set asked for is unknown or not supported here.
void multimodal_logits_forward(const MultimodalForward& args, const Threads& threads);
void multimodal_logits_backward(const MultimodalBackward& args, const Threads& threads);

}  // namespace fastadapters::cpu

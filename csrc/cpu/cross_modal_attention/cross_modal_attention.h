// Cross-modal attention on the CPU.
#pragma once

#include "../../cross_modal_attention.h"
#include "../threads.h"

namespace fastadapters::cpu {

// How many floats `state` has.
int64_t cross_modal_attention_state(const CrossModalAttention& args);

// Throw std::invalid_argument where the instruction set asked for is unknown or not supported here.
void cross_modal_attention_forward(const CrossModalAttentionForward& args, const Threads& threads);
void cross_modal_attention_backward(const CrossModalAttentionBackward& args,
                                    const Threads& threads);

}  // namespace fastadapters::cpu

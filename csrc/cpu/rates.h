// Multiply-adds per second of one core, measured when called (some 100 microseconds). For CPUs that
// have the instruction set.
#pragma once

namespace fastadapters::cpu {

double avx512_rate();       // fp32
double avx512_bf16_rate();  // pairs of bf16

}  // namespace fastadapters::cpu

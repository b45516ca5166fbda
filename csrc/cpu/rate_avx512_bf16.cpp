#include "rates.h"

#if defined(__AVX512BF16__)
#include "rate.h"

double fastadapters::cpu::avx512_bf16_rate() { return measure<Gemm<Pair>>(); }
#endif

#include "rates.h"

#if defined(__AVX512F__)
#include "rate.h"

double fastadapters::cpu::avx512_rate() { return measure<Gemm<Single>>(); }
#endif

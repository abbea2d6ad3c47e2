/* The kernels for processors with AVX2 and FMA. */
#include "nnx_cpu.h"

#ifdef NNX_X86
#include <math.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define KERNELS_NAME kernels_avx2
#define ISA "avx2"
#include "kernels.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif

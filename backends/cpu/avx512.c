/* The kernels for processors with AVX-512. */
#include "nnx_cpu.h"

#ifdef NNX_X86
#include <math.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define KERNELS_NAME kernels_avx512
#define ISA "avx512"
#include "kernels.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif

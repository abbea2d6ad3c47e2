/* The kernels for processors with AVX-512. */
#include "nnx_cpu.h"

#ifdef NNX_X86
#include <immintrin.h>
#include <math.h>
#include <string.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define KERNELS_NAME kernels_avx512
#define ISA "avx512"
#define SPLAT_f32 _mm512_set1_ps
#define SPLAT_f64 _mm512_set1_pd
#define VFMA_f32 _mm512_fmadd_ps
#define VFMA_f64 _mm512_fmadd_pd
#define VECTOR 64 /* bytes */
#define FUSED
#include "kernels.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif

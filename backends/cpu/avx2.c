/* The kernels for processors with AVX2 and FMA. */
#include "nnx_cpu.h"

#ifdef NNX_X86
#include <immintrin.h>
#include <math.h>
#include <string.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define KERNELS_NAME kernels_avx2
#define ISA "avx2"
#define SPLAT_f32 _mm256_set1_ps
#define SPLAT_f64 _mm256_set1_pd
#define VFMA_f32 _mm256_fmadd_ps
#define VFMA_f64 _mm256_fmadd_pd
#define VECTOR 32 /* bytes */
#define FUSED
#include "kernels.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif

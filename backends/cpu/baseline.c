/* The kernels for any processor of this kind: SSE2 on x86-64, NEON on 64-bit Arm. */
#include "nnx_cpu.h"

#include <math.h>
#include <string.h>

#define KERNELS_NAME kernels_baseline
#define ISA "baseline"
#define SPLAT_f32(x) ((x) - (vector_f32){0}) /* keeps the sign of 0 */
#define SPLAT_f64(x) ((x) - (vector_f64){0})
#ifdef __aarch64__
#include <arm_neon.h>
#define FUSED /* its multiply-add is one instruction */
#define VFMA_f32(a, b, c) ((vector_f32)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define VFMA_f64(a, b, c) ((vector_f64)vfmaq_f64((float64x2_t)(c), (float64x2_t)(a), (float64x2_t)(b)))
#else
#define VFMA_f32(a, b, c) ((a) * (b) + (c))
#define VFMA_f64(a, b, c) ((a) * (b) + (c))
#endif
#define VECTOR 16 /* bytes */
#include "kernels.inc"

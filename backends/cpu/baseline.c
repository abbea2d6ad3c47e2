/* The kernels for any processor of this kind: SSE2 on x86-64, NEON on 64-bit Arm. */
#include "nnx_cpu.h"

#include <math.h>

#define KERNELS_NAME kernels_baseline
#define ISA "baseline"
#include "kernels.inc"

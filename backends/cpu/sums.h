#ifndef NNX_SUMS_H
#define NNX_SUMS_H
#include <stdint.h>

typedef struct {
    const void *x;
    int64_t n;
    int *found; /* set to 1 where a block holds NaN or inf; never set to anything else */
} FiniteArgs;

typedef struct {
    const void *x;
    void *out;
    int64_t n;
    double scale;
} TotalArgs;

enum { SUMS_BLOCK = 4096, SUMS_LANES = 16 };
#endif

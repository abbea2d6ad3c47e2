#ifndef NNX_RELU_H
#define NNX_RELU_H
#include <stdint.h>

typedef struct {
    const void *x, *y; /* y: what forward returned; positive where x was */
    void *out;
} ReluArgs;

typedef struct {
    const void *dy, *y, *bias;
    void *z, *dbias;
    int64_t rows, n; /* of each model */
    int64_t apart;   /* elements between the biases of two models; 0 if they share one */
    int accumulate;
} BiasArgs;

typedef struct {
    const void *x;
    int64_t n;
    int *found; /* set to 1 where a block holds NaN or inf; never set to anything else */
} FiniteArgs;

enum { FINITE_BLOCK = 4096 };
enum { COLUMNS = 128 }; /* of a block whose sums are kept in the first-level cache */
#endif

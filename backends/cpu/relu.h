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
    int64_t row;     /* elements between two rows of z, where only a bias is added */
    int64_t apart;   /* elements between the biases of two models; 0 if they share one */
    int accumulate;
} BiasArgs;

enum { COLUMNS = 128 }; /* of a block whose sums are kept in the first-level cache */
#endif

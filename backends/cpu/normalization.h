#ifndef NNX_NORMALIZATION_H
#define NNX_NORMALIZATION_H
#include <math.h>
#include <stdint.h>

typedef struct {
    void *data;   /* NULL if there is none */
    int64_t step; /* elements from a model's to the next one's; 0 if all share it */
} Vector;

typedef struct {
    const void *x, *dy;
    void *out;         /* y or dx; NULL if dx isn't wanted */
    void *mean, *rstd; /* of each row or column; a mean that is NULL is 0 */
    Vector weight, bias, dweight, dbias, running_mean, running_var;
    void *partial; /* (models, chunks, 2, n): dweight and dbias of each chunk */
    int64_t rows, n, chunks; /* of each model */
    double eps, momentum;
    int training, accumulate[2];
} NormArgs;

enum {
    NORM_LANES = 16,    /* in which a row is added up: element i in lane i % NORM_LANES */
    NORM_STRETCH = 256, /* elements of which lanes add up before the total is taken further in float64 */
    STACK = 64,    /* the same for the rows under a column's sum */
};
#endif

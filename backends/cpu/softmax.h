#ifndef NNX_SOFTMAX_H
#define NNX_SOFTMAX_H
#include <math.h>
#include <stdint.h>
#include <string.h>

/* A number, or an array of one for all models or one for each (step 0 or 1). */
typedef struct {
    double value;
    const void *data;
    int dtype;
    int64_t step;
} Number;

static inline double number_at(const Number *a, int64_t model) {
    const int64_t i = model * a->step;
    if (!a->data)
        return a->value;
    return a->dtype == F32 ? ((const float *)a->data)[i] : ((const double *)a->data)[i];
}

typedef struct {
    const void *logits;
    const int64_t *labels;  /* or NULL, and then */
    const void *soft;       /* targets like logits */
    const void *weight;     /* of each sample, or NULL */
    const void *of_class;   /* weight of each class, or NULL */
    void *loss, *gradient;  /* gradient: NULL if none is wanted */
    void *factors, *slopes; /* of each row: see nll_weights and nll_factors */
    int64_t models, rows, n; /* K, N, C */
    int64_t targets, weights; /* how many there are: N for all models, or K N */
    int64_t ignored;         /* label that counts for nothing, if `ignores` */
    double smoothing;
    Number normalizer, scale; /* the scale is that of the gradient */
    int ignores, normalized;
    int plain; /* neither weights of any kind nor a normalizer: no row is selected out */
    int terms; /* a sum over classes: targets are soft, or smoothed */
} NllArgs;

/* Index of a row's target or weight among `n`, those of one model or of all. */
static inline int64_t of_row(int64_t row, int64_t n) { return row < n ? row : row % n; }

enum {
    SOFTMAX_LANES = 32,       /* partial sums; GCC unrolls a loop of 16 before it could be vectorized */
    NLL_BLOCK = 1024, /* elements added up in lanes before they go into a float64 sum */
    FEW = 32,         /* classes up to which rows are taken SOFTMAX_LANES at a time */
};

/* Softmax alone, or its logarithm. */
typedef struct {
    const void *x, *dy; /* x: of the backward pass what the forward pass returned */
    void *out;
    int64_t n;
    int log;
} SoftmaxArgs;

typedef struct {
    const void *scores;
    const int64_t *labels;
    int64_t *right, *counted; /* counted: NULL, or the rows that aren't ignored */
    int64_t rows, n, n_labels, k, ignored;
} CountArgs;
#endif

#ifndef NNX_OPTIMIZERS_H
#define NNX_OPTIMIZERS_H
#include <stdint.h>

enum { MAX_SLOTS = 3, MAX_SETTINGS = 5, STRETCH = 4 };

/* An update of the flat vector; see `Update` in base.py. */
typedef struct {
    void *value, *grad, *slots[MAX_SLOTS]; /* (K, P) each; a slot may be NULL */
    int64_t models, size;                  /* K, P */
    const double *stretches;               /* start, stop, lr_scale, decay_scale of each */
    int64_t n_stretches;
    const void *scale; /* (K,) or NULL */
    double rate, decay, shrink;
    double settings[MAX_SETTINGS]; /* the rule's own numbers, in the order of its arguments */
    double *squares;               /* of `condition`: a sum for each block, or NULL */
} UpdateArgs;

enum { SQUARES = 4096 }; /* elements of a block; the last of a model may have fewer */
enum { CONDITION_LANES = 16 };     /* sums in a block, added up at its end */
#endif

#ifndef NNX_DROPOUT_H
#define NNX_DROPOUT_H
#include <stdint.h>

typedef struct {
    const void *x;
    void *out;
    unsigned char *mask; /* read by backward: whether an element is dropped */
    int64_t n;
    uint32_t threshold; /* of a word's upper 24 bits */
    double scale;
    uint64_t use, step;
    uint64_t key[10][2]; /* of each round */
} DropoutArgs;

enum { WORDS = 512 }; /* of an item: 64 blocks of the generator */

/* Words WORDS * item and on of the stream, as many as there are elements. */
void random_words(const DropoutArgs *a, int64_t item, uint32_t *words, int64_t n);
#endif

#ifndef NNX_GEMM_H
#define NNX_GEMM_H
#include <stdint.h>

typedef struct {
    const void *a, *b, *bias; /* bias: added to every row at the end, or NULL */
    void *c;                  /* rows of n, contiguous */
    int64_t m, n, k;
    int64_t a_row, a_column, b_row, b_column; /* strides, in elements */
    int accumulate, relu;
    int64_t row_block, column_blocks;
    int64_t column_block; /* of a product by BLAS */
    int is_double;
} GemmArgs;

enum { GEMM_COLUMNS = 64, GEMM_DEPTH = 288, GEMM_ROWS = 192 }; /* of a block; see gemm.inc */
#define HEIGHT 6 /* rows of a tile */
#define EACH_ROW(X) X(0) X(1) X(2) X(3) X(4) X(5)
#endif
